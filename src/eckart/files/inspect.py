"""What a compressed folder holds, read from its headers alone; and the way back to an ordinary dense folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from eckart.atomic import appearing, check_output, write_json
from eckart.errors import EckartError
from eckart.files.elastic import FOLDER as ELASTIC
from eckart.files.elastic import read_order
from eckart.files.entries import (
    EMBEDDING,
    LINEAR,
    QUANT_METHOD,
    TIED_HEAD,
    EckartConfig,
    blank_map,
    blank_module,
    check_files,
)
from eckart.files.folder import TensorFile, check_model_folder, copy_companions, quiet, tensor_file
from eckart.files.huggingface import check_contents
from eckart.files.neurons import full_shape, padded
from eckart.files.shards import Source, write_shards
from eckart.files.sharing import SHARED, borrowed_maps, stored_name
from eckart.hosts import EmbeddingHost, is_conv1d, is_linear, map_of, offset_of
from eckart.maps import rank_bound
from eckart.progress import Progress, silent

# Options of transformers' configurations by which a class gains the biases that a compressed layer may have.
BIAS_OPTIONS = ("attention_bias", "mlp_bias", "use_bias", "bias")


@dataclass(frozen=True, slots=True)
class LayerContents:
    """One compressed layer of a folder.

    Attributes:
        name: its module name.
        kind: "linear" or "embedding" (with the head tied to it, if it is).
        structure: class of its map in small letters, "lowrank" or "shared lowrank" for instance.
        shape: (out, in); (vocabulary, width) for an embedding.
        rank: largest rank the structure allows.
        numbers: numbers stored, bias and codes included; those of a shared tensor with its owner.
        dense_numbers: the same of the dense layer.
        nbytes: bytes stored, index tensors included.
    """

    name: str
    kind: str
    structure: str
    shape: tuple[int, int]
    rank: int
    numbers: int
    dense_numbers: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a model folder holds.

    Attributes:
        folder: the folder.
        architecture: class of the model.
        layers: the compressed layers, in the order of their names' numbers; none for a dense folder.
        parameters: numbers stored, in compressed layers and elsewhere.
        dense_parameters: the same of the dense model.
        nbytes: bytes of all tensors.
        made_by: what config.json says of the run that made it: method, settings, figures.
        elastic: "least" and "largest" size of an elastic folder, and "nbytes" of its components; None of another.
    """

    folder: Path
    architecture: str
    layers: tuple[LayerContents, ...]
    parameters: int
    dense_parameters: int
    nbytes: int
    made_by: dict[str, Any]
    elastic: dict[str, Any] | None = None

    @property
    def kept(self) -> float:
        """Share of the dense model's parameters."""
        return self.parameters / self.dense_parameters

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder), "kept": self.kept}


def show(folder: str | Path) -> Contents:
    """Return what a folder holds, reading config.json and the headers of its safetensors but no weights.

    Raises:
        EckartError: if the folder is missing, damaged or incomplete, or a tensor does not fit its layer's spec.
    """
    folder = Path(folder)
    raw, config, tensors = _opened(folder)
    model = _skeleton(folder, raw, config)
    owners = {owner for entry in config.layers.values() for owner in entry.get(SHARED, {}).values()}
    layers = tuple(
        _layer_contents(name, entry, tensors, model, name in owners)
        for name, entry in sorted(config.layers.items(), key=lambda item: _natural(item[0]))
        if entry["kind"] != TIED_HEAD
    )
    held = {key for name, e in config.layers.items() if e["kind"] != TIED_HEAD for key in _stored(name, e)}
    others = _count(tensors, [name for name in tensors.files if name not in held])[0]
    parameters, nbytes = others + sum(layer.numbers for layer in layers), _count(tensors, list(tensors.files))[1]
    dense = parameters + sum(layer.dense_numbers - layer.numbers for layer in layers)
    elastic = getattr(config, "elastic", None)
    if elastic is not None:
        read_order(folder)  # an incomplete copy is noticed here
        elastic = {**elastic, "nbytes": sum(path.stat().st_size for path in (folder / ELASTIC).iterdir())}
    return Contents(folder, type(model).__name__, layers, parameters, dense, nbytes, config.made_by, elastic)


def densify(folder: str | Path, out: str | Path, progress: Progress = silent) -> Path:
    """Write a compressed folder as an ordinary one with dense weights, which loads without eckart.

    One shard of dense weights is held in memory at a time. Every tensor keeps its dtype: a float16 folder gets products
    rounded to float16. Biases that the compression added are kept, if the model's class has an option for them.

    Args:
        folder: the compressed folder.
        out: where to write; must not exist or be empty.
        progress: called with ("densify", tensors done, tensors in all).

    Returns:
        `out`.

    Raises:
        EckartError: if `folder` is dense, damaged or incomplete, `out` is not empty, or the class cannot hold a bias.
    """
    folder, out = Path(folder), Path(out)
    raw, config, tensors = _opened(folder)
    if not config.layers:
        raise EckartError(f"{folder} is not compressed by eckart, so there is nothing to make dense")
    check_output(out)
    dense_raw = {key: value for key, value in raw.items() if key not in ("quantization_config", "keep")}
    if config.tied or any(entry["kind"] == TIED_HEAD for entry in config.layers.values()):
        dense_raw["tie_word_embeddings"] = True
    with quiet():
        options, zeros = _bias_options(folder, dense_raw, config, tensors)
    dense_raw.update(options)
    sources = _sources(config, tensors, _skeleton(folder, dense_raw, None), zeros)
    with appearing(out) as temporary:
        write_shards(temporary, sources, lambda done: progress("densify", done, len(sources)))
        copy_companions(folder, temporary)
        write_json(temporary / "config.json", dense_raw)
    return out


def _opened(folder: Path) -> tuple[dict[str, Any], EckartConfig, TensorFile]:
    """Return the raw config, its part for eckart (no layers for a dense folder) and the tensors, all checked."""
    raw = check_model_folder(folder)
    stated = raw.get("quantization_config") or {"quant_method": QUANT_METHOD}
    if stated.get("quant_method") != QUANT_METHOD:
        raise EckartError(f"{folder} was quantized by {stated.get('quant_method')!r}, which eckart does not read")
    config = EckartConfig(**stated)
    for name, entry in config.layers.items():
        if not isinstance(entry, dict) or entry.get("kind") not in (LINEAR, EMBEDDING, TIED_HEAD):
            raise EckartError(f"config.json in {folder} does not say what kind of layer {name!r} is; it is damaged")
    tensors = tensor_file(folder)
    check_files([str(folder / file) for file in sorted(set(tensors.files.values()))], config.layers)
    return raw, config, tensors


def _skeleton(folder: Path, raw: Mapping[str, Any], config: EckartConfig | None) -> nn.Module:
    """Return the dense model on the meta device, after checking that it has the compressed layers in their shapes."""
    settings = {key: value for key, value in raw.items() if key not in ("quantization_config", "keep")}
    cls: Any = getattr(transformers, _class_name(raw), None)
    if cls is None:
        raise EckartError(
            f"{folder} needs the class {_class_name(raw)}, which this version of transformers does not have"
        )
    try:
        with quiet(), init_empty_weights(include_buffers=True):
            settings_of_model = AutoConfig.for_model(settings.pop("model_type"), **settings)
            model: nn.Module = cls.from_config(settings_of_model) if cls is AutoModel else cls(settings_of_model)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise EckartError(f"transformers does not understand {folder / 'config.json'}: {reason}") from error
    modules = dict(model.named_modules())
    for name, entry in config.layers.items() if config else ():
        if name not in modules:
            raise EckartError(f"{type(model).__name__} has no layer {name!r} that the config of {folder} names")
        if entry["kind"] != TIED_HEAD:
            _require_shape(name, full_shape(entry, blank_map(name, entry, torch.float32).shape), modules[name])
    return model


def _class_name(raw: Mapping[str, Any]) -> str:
    return str((raw.get("architectures") or ["AutoModel"])[0])


def _require_shape(name: str, shape: tuple[int, int], module: nn.Module) -> None:
    if not isinstance(module, nn.Embedding) and not is_linear(module):
        raise EckartError(
            f"layer {name!r} is a {type(module).__name__} in this model, which holds no matrix to replace"
        )
    weight = cast(Tensor, module.weight)
    m, n = reversed(weight.shape) if is_conv1d(module) else weight.shape
    if shape != (m, n):
        raise EckartError(f"layer {name!r} is {m} x {n} in this model, but its spec is {shape[0]} x {shape[1]}")


def _layer_contents(
    name: str, entry: Mapping[str, Any], tensors: TensorFile, model: nn.Module, lends: bool
) -> LayerContents:
    map_ = blank_map(name, entry, torch.float32)
    taken = entry.get(SHARED, {})
    module = blank_module(name, entry)
    own = [key for key in module.state_dict() if key not in taken]
    nbytes = _count(tensors, [f"{name}.{key}" for key in own])[1]
    numbers = map_.numbers + (map_.shape[0] if entry.get("bias") else 0)
    numbers -= sum(factor.numbers for factor in borrowed_maps(module, taken))
    dense = sum(p.numel() for p in model.get_submodule(name).parameters())
    structure = "neurons" if "neurons" in entry else str(entry["map"]["op"]).lower()
    structure = f"{SHARED} " * (lends or SHARED in entry) + structure
    return LayerContents(name, entry["kind"], structure, map_.shape, rank_bound(map_), numbers, dense, nbytes)


def _count(tensors: TensorFile, names: Sequence[str]) -> tuple[int, int]:
    """Return floating numbers and bytes of some tensors."""
    numbers = nbytes = 0
    for name in names:
        dtype, size = tensors.dtype(name), torch.Size(tensors.shape(name)).numel()
        numbers += size if dtype.is_floating_point else 0
        nbytes += size * dtype.itemsize
    return numbers, nbytes


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort "layers.2" before "layers.10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _stored(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Return the names under which a compressed layer's tensors are stored."""
    return [stored_name(name, entry, key) for key in blank_module(name, entry).state_dict()]


def _bias_options(
    folder: Path, raw: Mapping[str, Any], config: EckartConfig, tensors: TensorFile
) -> tuple[dict[str, bool], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Find options under which the dense class has every bias of the compressed layers.

    Returns:
        options to set in config.json, and shape and dtype of the biases that they add to other layers, to be zero.
    """
    needed = {f"{name}.bias" for name, entry in config.layers.items() if entry.get("bias")}
    before = dict(_skeleton(folder, raw, config).named_parameters())
    if needed <= before.keys():
        return {}, {}
    options: dict[str, bool] = {}
    after = before
    for option in BIAS_OPTIONS:
        if raw.get(option) is False:
            tried = dict(_skeleton(folder, {**raw, **options, option: True}, None).named_parameters())
            if (needed - after.keys()) & tried.keys():
                options, after = {**options, option: True}, tried
    lost = sorted(needed - after.keys())
    if lost:
        raise EckartError(
            f"{len(lost)} compressed layers have a bias, {lost[0]} for instance, for which {_class_name(raw)} "
            "has no place; compress without biases (--set bias=false with the method eckart)"
        )
    zeros = {}
    for name in after.keys() - before.keys() - needed:
        weight = name.removesuffix("bias") + "weight"
        stated = tensors.dtype(weight) if weight in tensors else tensors.dtype(next(iter(tensors.files)))
        zeros[name] = (tuple(after[name].shape), stated)
    return options, zeros


def _sources(
    config: EckartConfig,
    tensors: TensorFile,
    model: nn.Module,
    zeros: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> dict[str, Source]:
    """Return the tensors of the dense folder by name: layers made dense, other tensors as they are, zero biases."""
    out, used = dict[str, Source](), {config.sentinel}
    for name, entry in config.layers.items():
        if entry["kind"] == TIED_HEAD:
            continue
        keys = _stored(name, entry)
        used.update(keys)
        m, n = full_shape(entry, blank_map(name, entry, torch.float32).shape)
        itemsize = next((t for t in map(tensors.dtype, keys) if t.is_floating_point), torch.float32).itemsize
        transposed = is_conv1d(model.get_submodule(name))
        out[f"{name}.weight"] = Source(m * n * itemsize, partial(_weight, name, entry, tensors, transposed))
        if entry.get("bias"):
            out[f"{name}.bias"] = Source(m * itemsize, partial(_bias, name, entry, tensors))
    for name in tensors.files:
        if name not in used:
            out[name] = Source(_count(tensors, [name])[1], partial(tensors.read, name))
    for name, (shape, dtype) in zeros.items():
        out[name] = Source(shape[0] * dtype.itemsize, partial(torch.zeros, shape, dtype=dtype))
    return dict(sorted(out.items(), key=lambda item: _natural(item[0])))


def _filled(name: str, entry: Mapping[str, Any], tensors: TensorFile) -> nn.Module:
    module = blank_module(name, entry)
    held = {key: tensors.read(stored_name(name, entry, key)) for key in module.state_dict()}
    module.load_state_dict(held, assign=True)
    check_contents(name, module)
    return module


@torch.no_grad()
def _weight(name: str, entry: Mapping[str, Any], tensors: TensorFile, transposed: bool) -> Tensor:
    module = _filled(name, entry, tensors)
    map_ = module.held_map() if isinstance(module, EmbeddingHost) else map_of(module)
    # In float32 whatever is stored, so that the only rounding is the one of the result.
    weight = padded(entry, map_.to(torch.float32).dense().to(map_.dtype))
    return (weight.mT if transposed else weight).contiguous()


def _bias(name: str, entry: Mapping[str, Any], tensors: TensorFile) -> Tensor:
    return padded(entry, cast(Tensor, offset_of(_filled(name, entry, tensors))).detach())
