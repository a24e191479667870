"""Makes transformers know compressed folders, without importing transformers or being imported by the user.

`import torch` calls `arm` through the entry point group "torch.backends", and so does `import eckart`. It only puts a
finder on `sys.meta_path`; when anybody imports `transformers.quantizers.auto`, the quantizer is registered right after.
`ECKART_AUTOLOAD=0` switches both off; `import eckart.files.huggingface` then registers by hand.

An exception in an entry point of this group breaks `import torch`, and one in the finder breaks `import transformers`,
for people who may not be using eckart at all: hence a registration that fails is logged, not raised. A compressed
folder is then refused by transformers because of its sentinel tensor, never loaded wrongly.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "transformers.quantizers.auto"
REGISTRATION = "eckart.files.huggingface"
SWITCH = "ECKART_AUTOLOAD"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only `TARGET`, once, and has the registration imported after it ran."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the ordinary spec of `TARGET` with a loader that registers afterwards; None for anything else."""
        if fullname != TARGET:
            self._register_if_missed()
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _import_registration()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _register_if_missed(self) -> None:
        # `TARGET` may itself have been the first to import torch: it was then half imported when this finder came, and
        # is registered with at the first import after it is whole.
        if _is_whole() and self in sys.meta_path:
            sys.meta_path.remove(self)
            _import_registration()


def arm() -> None:
    """Register with transformers now if it is loaded, or as soon as it is; nothing if `ECKART_AUTOLOAD=0`."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    if _is_whole():
        _import_registration()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _is_whole() -> bool:
    """Tell whether `TARGET` is imported as far as what the registration needs, which it defines last."""
    return hasattr(sys.modules.get(TARGET), "register_quantizer")


def _import_registration() -> None:
    try:
        importlib.import_module(REGISTRATION)
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:  # another transformers, a broken install
        logging.getLogger("eckart").warning("folders compressed by eckart cannot be loaded here: %s", error)
