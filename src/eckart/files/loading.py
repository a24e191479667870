"""Loading a model folder by the class that its config names, at any size it holds."""

from pathlib import Path
from typing import Any, cast

import transformers
from transformers import AutoModel, PreTrainedModel

from eckart.errors import EckartError
from eckart.files.elastic import read_order
from eckart.files.folder import check_model_folder


def load(folder: str | Path, *, keep: float | None = None, **options: Any) -> PreTrainedModel:
    """Load a model, compressed or not, as `from_pretrained` of its own class does.

    Args:
        folder: the model folder.
        keep: for an elastic folder, the share of the dense model's parameters to load; None for all it holds.
        **options: passed on to `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        EckartError: if the folder is missing, is not elastic although `keep` is given, or does not hold that size.
    """
    folder = Path(folder)
    raw = check_model_folder(folder)
    if keep is not None:
        read_order(folder).check(keep)
        options["keep"] = keep
    name = str((raw.get("architectures") or ["AutoModel"])[0])
    cls: Any = getattr(transformers, name, None)
    if cls is None:
        raise EckartError(f"{folder} needs the class {name}, which this version of transformers does not have")
    return cast(PreTrainedModel, (AutoModel if name == "AutoModel" else cls).from_pretrained(folder, **options))
