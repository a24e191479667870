"""Saved adapters on the folder of their model: loading both together, and writing them as one plain model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.atomic import appearing, check_output, read_json
from eckart.errors import EckartError
from eckart.files.adapters import read_adapter
from eckart.files.entries import EckartConfig, sentinel_name
from eckart.files.folder import check_model_folder, copy_companions, quiet
from eckart.files.huggingface import localized, register
from eckart.files.inspect import show
from eckart.files.loading import load
from eckart.files.peft import read_peft
from eckart.files.sharing import SHARED, tied_keys
from eckart.files.text import load_tokenizer
from eckart.hosts import Host, map_of, offset_of
from eckart.methods.adapt.adapt import adapters as adapters_of
from eckart.methods.adapt.loading import is_own, load_adapter
from eckart.methods.adapt.tasks import load_task_model, read_examples
from eckart.progress import Progress, silent

# What a fine-tune writes beside an adapter.
REPORT = "report.json"
# Heads of classifications as transformers calls them.
CLASSIFIERS = ("classifier", "score")
# Windows of a text that layers are merged on, and how many go through the model at once.
WINDOWS, BATCH = 64, 8


@dataclass(frozen=True, slots=True)
class Folded:
    """What folding adapters into a model wrote.

    Attributes:
        out: the folder.
        adapters: names of the adapters, in the order in which they were composed.
        lost: share of its change that the structure of each adapted layer cannot hold; 0.0 for a dense one.
        nbytes: of the tensors.
    """

    out: Path
    adapters: tuple[str, ...]
    lost: dict[str, float]
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"out": str(self.out)}


def fold_adapters(
    model: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    text_field: str = "text",
    length: int = 256,
    progress: Progress = silent,
) -> Folded:
    """Write a model with saved adapters merged into it: a plain folder that loads without them.

    Every layer keeps its structure and its dtype, so a compressed model stays compressed; where that cannot hold all of
    a change, the nearest is written (see `Adapters.merge`) and the share lost is returned.

    Args:
        model: folder of the base, dense or compressed.
        adapters: folders of one or more adapters, eckart's or PEFT's, composed in this order.
        out: folder to write; must not hold anything yet.
        calibration: text to be near on, 64 windows drawn from it; by default the nearest weights are taken.
        text_field: its field or column of the text, if it is .jsonl or .tsv.
        length: tokens of a window.
        progress: told of the stages "adapters" and "write".

    Raises:
        EckartError: if a folder is damaged or of another base, or an adapter is no matrix; nothing is written then.
    """
    folder, target = Path(model), Path(out)
    paths = [Path(adapters)] if isinstance(adapters, str | Path) else [Path(each) for each in adapters]
    if not paths:
        raise EckartError("give the folder of one adapter at least")
    check_output(target)
    check_model_folder(folder)
    texts = calibration and read_examples(
        load_tokenizer(folder), Path(calibration), length=length, text_field=text_field, label_field=None
    )
    register()
    labels = class_names(paths)
    loaded = load_task_model(folder, labels, dtype="auto")[0] if labels else _plain(folder)
    names = put_adapters(loaded, paths, progress)
    data = [{"input_ids": rows} for rows in texts.drawn(WINDOWS, seed=0).split(BATCH)] if texts else None
    handle = adapters_of(loaded)
    lost = handle.merge(data)
    handle.fold()
    _describe(loaded, list(lost), names)
    progress("write", 0, 1)
    with appearing(target) as temporary:
        with quiet():
            loaded.save_pretrained(temporary)
        copy_companions(folder, temporary)
        contents = show(temporary)  # every tensor is checked against its description
    progress("write", 1, 1)
    return Folded(target, tuple(names), lost, contents.nbytes)


def _plain(folder: Path) -> PreTrainedModel:
    with quiet():
        return load(folder, dtype="auto", local_files_only=True).eval()


def put_adapters(model: PreTrainedModel, folders: Sequence[Path], progress: Progress = silent) -> list[str]:
    """Put saved adapters on a model, all active, composed in this order; return their names.

    Raises:
        EckartError: if one is damaged or was made for another base.
    """
    names: list[str] = []
    for index, folder in enumerate(folders):
        progress("adapters", index, len(folders))
        name = folder.absolute().name.replace(".", "-")
        load_adapter(model, folder, name if name not in names else f"{name}-{index}")
        names = adapters_of(model).names
    progress("adapters", len(folders), len(folders))
    adapters_of(model).use(*names)
    return names


def class_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the classes that saved adapters have a head for; none if they have no head.

    `eckart.tune` writes down what they are called; other heads give LABEL_0, LABEL_1 ... as transformers does.

    Raises:
        EckartError: if two of them have heads, of which a model can have one.
    """
    found = [(folder, _head(folder)) for folder in folders]
    heads = [(folder, head) for folder, head in found if head is not None]
    if not heads:
        return ()
    if len(heads) > 1:
        raise EckartError(f"{heads[0][0]} and {heads[1][0]} both have a head, and a model has one; fold them apart")
    folder, head = heads[0]
    known = read_json(folder / REPORT).get("labels", []) if (folder / REPORT).is_file() else []
    count = min(tensor.shape[0] for tensor in head.values() if tensor.ndim == 2)
    return tuple(known) if len(known) == count else tuple(f"LABEL_{i}" for i in range(count))


def _head(folder: Path) -> Mapping[str, Tensor] | None:
    """Return the tensors of an adapter's head, if it trains one."""
    states: dict[str, dict[str, Tensor]] = {}
    if is_own(folder):
        states = read_adapter(folder).trained
    else:
        for full, tensor in read_peft(folder).trained.items():
            head, _, key = full.partition(".")
            states.setdefault(head, {})[key] = tensor
    return next((state for name, state in states.items() if name in CLASSIFIERS), None)


def _describe(model: PreTrainedModel, layers: Sequence[str], adapters: Sequence[str]) -> None:
    """Put the folded maps of a compressed model into its config, by the names they have in this model, and let layers
    share what they still have in common alone.
    """
    stated = getattr(model.config, "quantization_config", None)
    if not isinstance(stated, EckartConfig):
        return
    before = localized(model, stated.layers)
    entries = {name: _described(model, name, entry, name in layers) for name, entry in before.items()}
    tied_keys(model, before, tied=False)
    tied_keys(model, entries, tied=True)
    stated.layers, stated.sentinel = entries, sentinel_name(entries)
    figures = ("measured", "bytes_after", "parameters_after")  # of the model before it was adapted
    stated.made_by = {k: v for k, v in stated.made_by.items() if k not in figures} | {"folded": list(adapters)}


def _described(model: nn.Module, name: str, entry: Mapping[str, Any], folded: bool) -> dict[str, Any]:
    module, out = model.get_submodule(name), dict(entry)
    if folded and isinstance(module, Host):
        out |= {"map": map_of(module).spec(), "bias": offset_of(module) is not None}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    taken = {
        key: owner
        for key, owner in out.pop(SHARED, {}).items()
        if parameters.get(f"{name}.{key}") is parameters[f"{owner}.{key}"]
    }
    return out | ({SHARED: taken} if taken else {})
