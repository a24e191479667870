"""Makes transformers know compressed folders, without importing transformers or being imported by the user.

`import torch` calls `arm` through the entry point group "torch.backends", and so does `import eckart`. It only puts a
finder on `sys.meta_path`; when anybody imports `transformers.quantizers.auto`, the quantizer is registered right after.
An error in an entry point of this group would break `import torch`, hence nothing here may raise.
`ECKART_AUTOLOAD=0` switches the entry point off; `import eckart` still registers.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "transformers.quantizers.auto"
REGISTRATION = "eckart.files.huggingface"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only `TARGET`, once, and has the registration imported after it ran."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the ordinary spec of `TARGET` with a loader that registers afterwards; None for anything else."""
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            importlib.import_module(REGISTRATION)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register with transformers now if it is loaded, or as soon as it is."""
    if TARGET in sys.modules:
        importlib.import_module(REGISTRATION)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def arm() -> None:
    """The entry point called by `import torch`; does nothing if `ECKART_AUTOLOAD=0`."""
    if os.environ.get("ECKART_AUTOLOAD", "1") != "0":
        register()
