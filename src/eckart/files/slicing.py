"""Cutting an elastic folder down to a smaller one: which layers change, and the folder that holds the result."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eckart.atomic import appearing, check_output, write_json, write_text
from eckart.files.card import inherited, model_card
from eckart.files.elastic import Elastic, Slice, module_of, read_order
from eckart.files.entries import FORMAT, QUANT_METHOD, TIED_HEAD, EckartConfig, expected_tensors, sentinel_name
from eckart.files.folder import TensorFile, check_model_folder, copy_companions, tensor_file
from eckart.files.shards import Source, write_shards
from eckart.maps import LinearMap
from eckart.progress import Progress, silent

# What `made_by` says beside the settings.
FIGURES = ("parameters_before", "parameters_after", "bytes_before", "bytes_after", "measured")


def slice_folder(folder: str | Path, out: str | Path, *, keep: float, progress: Progress = silent) -> Path:
    """Write an elastic folder at a smaller size: an ordinary compressed folder, made without data.

    Args:
        folder: the elastic folder.
        out: where to write; must not exist or be empty.
        keep: share of the dense model's parameters that remains.
        progress: called with ("slice", tensors done, tensors in all).

    Returns:
        `out`.

    Raises:
        EckartError: if `folder` is not elastic, damaged or does not hold that size, or `out` is not empty.
    """
    folder, out = Path(folder), Path(out)
    raw = check_model_folder(folder)
    elastic = read_order(folder)
    plan = elastic.plan(keep)
    check_output(out)
    config, tensors = EckartConfig(**raw["quantization_config"]), tensor_file(folder)
    parts = _Parts(elastic, plan, keep, tensors)
    entries, sources = _layers(elastic, plan, config, parts)
    cut = {name: entry for name, entry in entries.items() if name in plan and plan[name].rank}
    gone = {*expected_tensors({name: config.layers[name] for name in cut if name in config.layers}), config.sentinel}
    gone |= {f"{name}.{part}" for name in cut for part in ("weight", "bias")}  # of what was dense
    for name in tensors.files:
        if name not in gone:
            nbytes = tensors.dtype(name).itemsize * math.prod(tensors.shape(name))
            sources[name] = Source(nbytes, partial(tensors.read, name))
    sentinel = sentinel_name(entries)
    if sentinel:
        sources[sentinel] = Source(0, partial(torch.empty, 0))
    made_by, rows = _figures(elastic, plan, config, keep)
    tied = any(entry["kind"] == TIED_HEAD for entry in entries.values())
    stated = {"quant_method": QUANT_METHOD, "format": FORMAT, "layers": entries, "sentinel": sentinel, "tied": tied}
    made = {key: value for key, value in raw.items() if key not in ("keep", "quantization_config")}
    made |= {"tie_word_embeddings": False} if tied else {}
    made |= {"quantization_config": {**stated, "made_by": made_by}} if entries else {}
    with appearing(out) as temporary:
        write_shards(temporary, sources, lambda done: progress("slice", done, len(sources)))
        copy_companions(folder, temporary)
        write_json(temporary / "config.json", made)
        write_text(temporary / "README.md", _card(folder, raw, made_by, rows))
        report = {"measured": None, "settings": made_by, "checked": None, "plan": _plan(elastic, made_by, rows)}
        write_json(temporary / "eckart.json", report)
    return out


@contextmanager
def sliced(folder: Path, out: Path, keep: float, progress: Progress = silent) -> Iterator[Path]:
    """Yield a folder beside `out` with an elastic folder cut to a size, and remove it afterwards."""
    check_output(out)
    parent = next(p for p in out.absolute().parents if p.exists())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=parent) as scratch:
        yield slice_folder(folder, Path(scratch) / "cut", keep=keep, progress=progress)


@dataclass(slots=True)
class _Parts:
    """The tensors of cut layers, built when they are read; the last layer is remembered, so that each is built once."""

    elastic: Elastic
    plan: Mapping[str, Slice]
    keep: float
    tensors: TensorFile
    _last: tuple[str, dict[str, Tensor]] | None = None

    def map(self, name: str) -> LinearMap:
        return self.elastic.map(name, self.plan[name].rank, self.keep)

    def module(self, name: str, map_: LinearMap) -> nn.Module:
        """Return the module of a cut layer; its bias, wherever its present form keeps that, has the map's dtype."""
        key = next((key for key in (f"{name}.bias", f"{name}.up.bias") if key in self.tensors), None)
        bias = None if key is None else self.tensors.read(key).to(map_.dtype)
        return module_of(map_, self.elastic.layer(name), bias)

    def read(self, name: str, key: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = name, self.module(name, self.map(name)).state_dict()
        return self._last[1][key]


def _layers(
    elastic: Elastic, plan: Mapping[str, Slice], config: EckartConfig, parts: _Parts
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Return the entries of config.json and the tensors of all cut layers."""
    entries, sources = dict[str, Any](), dict[str, Source]()
    for layer in elastic.layers:
        if not plan[layer.name].rank:
            stays = config.layers.get(layer.name)  # in a folder of codes, dense layers are codes as well
            entries |= {} if stays is None else {layer.name: stays}
            continue
        map_ = parts.map(layer.name)
        entries[layer.name] = elastic.entry(layer.name, map_)
        for key, tensor in parts.module(layer.name, map_).state_dict().items():
            sources[f"{layer.name}.{key}"] = Source(tensor.nbytes, partial(parts.read, layer.name, key))
    embedding = next((layer.name for layer in elastic.layers if layer.table and layer.name in entries), None)
    if elastic.tied_head is not None and embedding is not None:
        entries[elastic.tied_head] = {"kind": TIED_HEAD, "embedding": embedding}
    return entries, sources


def _figures(
    elastic: Elastic, plan: Mapping[str, Slice], config: EckartConfig, keep: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what config.json says of the making, and a row per layer."""
    rows: list[dict[str, Any]] = []
    for layer in elastic.layers:
        cut, dense = plan[layer.name], math.prod(layer.shape) + layer.bias
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "structure": elastic.structure(cut),
                "rank": cut.rank or min(layer.shape),
                "numbers": cut.numbers,
                "dense_numbers": dense,
                "nbytes": cut.nbytes,
                "loss": cut.loss,
            }
        )
    before = config.made_by
    after, nbytes = elastic.figures(plan, before["bytes_before"])
    made_by = {key: value for key, value in before.items() if key not in ("measured", "sizes")}
    figures = {"parameters_after": after, "bytes_after": nbytes, "measured": None}
    return {**made_by, "keep": keep, "cut_from": elastic.sizes[-1], **figures}, rows


def _plan(elastic: Elastic, made_by: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the plan as the eckart.json of a directly compressed folder has it."""
    names = ("method", "keep", "parameters_before", "parameters_after", "bytes_before", "bytes_after")
    plan = {name: made_by[name] for name in names}
    loss, kept = sum(row["loss"] for row in rows), plan["parameters_after"] / plan["parameters_before"]
    return {**plan, "unit": elastic.unit, "layers": list(rows), "spent": None, "loss": loss, "kept": kept}


def _card(folder: Path, raw: Mapping[str, Any], made_by: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the model card; nothing was measured at this size."""
    settings = {key: value for key, value in made_by.items() if key not in FIGURES}
    name = str((raw.get("architectures") or ["AutoModel"])[0])
    auto = "AutoModelForCausalLM" if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else "AutoModel"
    return model_card(str(made_by["model"]), settings, {**made_by, **inherited(folder), "auto_class": auto}, rows)
