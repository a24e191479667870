"""Compressed folders as transformers load them: the format, and the quantizer that reads it.

A compressed model is a normal Hugging Face folder. Its config.json holds

    "quantization_config": {
      "quant_method": "eckart",
      "format": 1,
      "layers": {
        "<module name>": {"kind": "linear",    "map": <spec>, "bias": true | false},
        "<module name>": {"kind": "embedding", "map": <spec>, "padding_idx": null | int},
        "<module name>": {"kind": "tied-head", "embedding": "<module name>"}
      },                  (layers with fewer hidden units say so: eckart.files.neurons)
      "sentinel": "<module name>.weight",
      "made_by": {...}
    }

<spec> is `LinearMap.spec()`: class, tensor shapes, plain fields. The safetensors hold the state dict of the model with
these modules replaced by hosts: "<name>.down.weight" and "<name>.up.weight" for a low-rank map, "<name>.basis.weight",
"<name>.coefficients.weight" and "<name>.order" for a pivoted one, "<name>.table.weight" and "<name>.rest.weight" for an
embedding; see `eckart.hosts`. A linear layer may take tensors from another one ("shared" in its entry, see
`eckart.files.sharing`). Everything else is as in the original folder, in its original dtype.

The sentinel is one more tensor with no elements, named like the dense weight of a compressed layer: without eckart,
transformers warns about an unknown quant_method and would go on with random weights; with the sentinel it finds a
weight of the wrong shape and stops.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.errors import EckartError, NumericalWarning
from eckart.files.neurons import check_neurons, full_shape, padded
from eckart.files.sharing import (
    borrowed,
    check_names,
    check_sharing,
    renamed,
    stored_name,
    tie,
    tied_keys,
    without_borrowed,
)
from eckart.hosts import (
    EmbeddingHost,
    Host,
    TiedHead,
    embedding_host,
    host,
    is_conv1d,
    leaf,
    map_of,
    offset_of,
    replace,
)
from eckart.maps import FAMILIES, LinearMap, LowRank, blank

QUANT_METHOD = "eckart"
FORMAT = 1
KINDS = LINEAR, EMBEDDING, TIED_HEAD = "linear", "embedding", "tied-head"


class EckartConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a compressed model; see the module's docstring.

    Args:
        layers: entries by module name.
        format: version of the format.
        sentinel: name of the sentinel tensor; chosen from the layers if not given.
        tied: whether the dense model tied its head to its embedding.
        made_by: method, settings and figures of the run that made it; not read.
        **rest: keys of later formats, kept.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        format: int = FORMAT,
        sentinel: str | None = None,
        tied: bool = False,
        made_by: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        if format > FORMAT:
            raise EckartError(
                f"this folder has format {format}, but this version of eckart reads {FORMAT}; update eckart"
            )
        self.quant_method = QUANT_METHOD
        self.format = format
        self.layers = check_entries(layers or {})
        self.sentinel = sentinel or sentinel_name(self.layers)
        self.tied = tied
        self.made_by = dict(made_by or {})
        rest.pop("quant_method", None)
        self.__dict__.update(rest)


def check_entries(layers: Any) -> dict[str, Any]:
    """Return the entries of a config as they are.

    Raises:
        EckartError: if they are not entries of a kind this version knows.
    """
    if not isinstance(layers, Mapping):
        raise EckartError(f"layers must be entries by module name, got a {type(layers).__name__}")
    for name, entry in layers.items():
        kind = entry.get("kind") if isinstance(entry, Mapping) else None
        needed = {LINEAR: ("map", "bias"), EMBEDDING: ("map",), TIED_HEAD: ("embedding",)}.get(str(kind))
        if needed is None:
            raise EckartError(f"layer {name!r} is of kind {kind!r}; this version of eckart reads {', '.join(KINDS)}")
        lacking = [key for key in needed if key not in entry]
        if lacking:
            raise EckartError(f"the spec of layer {name!r} is invalid: it has no {lacking[0]!r}")
        check_names(name, entry)
    check_neurons(layers)
    return dict(layers)


def sentinel_name(layers: Mapping[str, Any]) -> str | None:
    """Return the sentinel's name: config.json sorts its keys, so the smallest linear layer, never the first.

    Layers with fewer hidden units need none: they hold a weight of the wrong shape.
    """
    linear = [name for name, entry in layers.items() if entry["kind"] == LINEAR and "neurons" not in entry]
    names = linear or [name for name, entry in layers.items() if entry["kind"] == EMBEDDING]
    return f"{min(names)}.weight" if names else None


class EckartQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the hosts before the weights are loaded, and turns them back into dense layers on request."""

    is_trainable = True
    is_qat_trainable = True  # without it the Trainer refuses to train the factors
    is_compileable = True  # without it `generate` refuses to compile

    quantization_config: EckartConfig

    def is_serializable(self) -> bool:
        """Say that `save_pretrained` works."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to compress while loading: that takes a calibration run."""
        if not self.pre_quantized:
            raise EckartError(
                "a dense model cannot be compressed by passing a quantization_config; use eckart.compress"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        layers = localized(model, self.quantization_config.layers)
        check_files(kwargs.get("checkpoint_files"), self.quantization_config.layers)
        self._conv1d = {name for name in layers if is_conv1d(model.get_submodule(name))}
        self._without_bias = {name for name in layers if getattr(model.get_submodule(name), "bias", None) is None}
        insert_blank_hosts(model, layers)
        tied_keys(model, layers, tied=True)
        _pretend_weights(model, layers)
        ignored: set[str] = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        if self.quantization_config.sentinel:
            ignored.add(rf"(^|\.){re.escape(self.quantization_config.sentinel.removeprefix(_prefix(model)))}$")
        model._keys_to_ignore_on_load_unexpected = ignored  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, Host):
                module.__dict__.pop("weight", None)
        layers = localized(model, self.quantization_config.layers)
        tie(model, layers)
        for name, entry in layers.items():
            check_contents(name, model.get_submodule(name))
            source = _tied_bias(model, name) if entry["kind"] == TIED_HEAD else None
            if source is not None:
                model.get_submodule(name).bias = model.get_parameter(source)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the state dict with the sentinel and shared tensors once, for `save_pretrained`."""
        state, layers = dict(model.state_dict()), self.quantization_config.layers
        if borrowed(layers):
            state = without_borrowed(model, state, localized(model, layers))
        if self.quantization_config.sentinel:
            state[self.quantization_config.sentinel] = torch.empty(0)
        return state, {"eckart_format": str(FORMAT)}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        layers = localized(model, self.quantization_config.layers)
        gained = [name for name, entry in layers.items() if entry.get("bias") and name in self._without_bias]
        if gained:
            warnings.warn(
                f"{len(gained)} layers, {gained[0]} for instance, have gained a bias that the dense class may not load "
                "again; `eckart densify` writes a folder that it does",
                NumericalWarning,
                stacklevel=2,
            )
        tied_keys(model, layers, tied=False)
        return densify_hosts(model, layers, self._conv1d)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Point tensor-parallel rules at the factors: the wide side is sharded, the rank is replicated."""
        for name, entry in localized(model, self.quantization_config.layers).items():
            if "neurons" in entry:
                continue  # sharded like the dense layer
            wildcard = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            style = plan.pop(wildcard, None)
            if style is not None and entry["kind"] == LINEAR and entry["map"]["op"] == LowRank.__name__:
                plan[f"{wildcard}.{'up' if style.startswith('colwise') else 'down'}"] = style


def _prefix(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix else ""


def localized(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries by the names their modules have in this model.

    A folder written from a model with a head is also loaded without it, and the other way round: names may gain or lose
    the base model's prefix; a head that is not there is left out.

    Raises:
        EckartError: if a layer is in neither form.
    """
    modules = {name for name, _ in model.named_modules()}
    prefix, out = _prefix(model), {}

    def local(name: str) -> str | None:
        options = (name, prefix + name, name.removeprefix(prefix) if prefix else name)
        return next((option for option in options if option in modules), None)

    for name, entry in layers.items():
        found = local(name)
        if found is not None:
            if entry["kind"] == TIED_HEAD:
                entry = {**entry, "embedding": local(entry["embedding"])}
            out[found] = renamed(entry, local)
        elif entry["kind"] != TIED_HEAD and "." in name:
            raise EckartError(f"{type(model).__name__} has no layer {name!r} that this folder's config names")
    return out


def blank_map(name: str, entry: Mapping[str, Any], dtype: torch.dtype) -> LinearMap:
    """Return the map of an entry on the meta device.

    Raises:
        EckartError: if the entry is not a valid spec; the layer is named.
    """
    try:
        return blank(entry["map"], FAMILIES, dtype)
    except (EckartError, KeyError, TypeError, IndexError) as error:
        raise EckartError(f"the spec of layer {name!r} is invalid: {error}") from error


def insert_blank_hosts(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Replace the named modules by hosts on the meta device; every spec is checked against the module it replaces."""
    dtype = getattr(model, "dtype", torch.float32)
    made: dict[str, nn.Module] = {}
    for name, entry in sorted(layers.items(), key=lambda item: item[1]["kind"] == TIED_HEAD):
        old = model.get_submodule(name)
        if entry["kind"] == TIED_HEAD:
            embedding = made.get(entry["embedding"])
            if not isinstance(embedding, EmbeddingHost):
                raise EckartError(
                    f"the head {name!r} is tied to {entry['embedding']!r}, which is not a compressed embedding"
                )
            made[name] = TiedHead(embedding, None if _tied_bias(model, name) else _blank_bias(old))
            continue
        map_ = blank_map(name, entry, dtype)
        shape = _module_shape(old)
        if full_shape(entry, map_.shape) != shape:
            has, says = (f"{rows} x {columns}" for rows, columns in (shape, full_shape(entry, map_.shape)))
            raise EckartError(f"layer {name!r} is {has} in this model, but its spec is {says}")
        if entry["kind"] == EMBEDDING:
            made[name] = embedding_host(map_, entry.get("padding_idx"))
        else:
            bias = torch.empty(map_.shape[0], dtype=dtype, device="meta") if entry["bias"] else None
            made[name] = host(map_, bias)
    for name, module in made.items():
        replace(model, name, module)


def _pretend_weights(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give hosts a weight, until everything is loaded, that transformers takes for initialized.

    Before it loads, transformers lets a model initialize what the files lack, and some models reach for the weights of
    their children by name (GPT-2 for those of its projections).
    """
    initialized = torch.empty(0)
    initialized._is_hf_initialized = True  # type: ignore[attr-defined]
    for name in layers:
        module = model.get_submodule(name)
        if isinstance(module, Host):
            module.__dict__["weight"] = initialized


def _tied_bias(model: nn.Module, head: str) -> str | None:
    """Return the name of the parameter that a head's bias is tied to (BERT's), if it is.

    A folder whose embedding is compressed says that nothing is tied, so transformers does not do it.
    """
    tied = getattr(model, "_tied_weights_keys", None)
    return tied.get(f"{head}.bias") if isinstance(tied, dict) else None


def _blank_bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else torch.empty_like(bias, device="meta")


def _module_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return map_of(module).shape


def check_contents(name: str, module: nn.Module) -> None:
    """Check the index tensors of a compressed layer, as far as they are in memory.

    Raises:
        EckartError: if one points beyond its matrix; the layer is named.
    """
    if not isinstance(module, Host | EmbeddingHost):
        return
    map_ = module.held_map()
    if any(t.is_meta for t in map_.tensors().values()):
        return  # read later, by whoever offloads
    try:
        map_.validate()
    except EckartError as error:
        raise EckartError(f"the tensors of layer {name!r} are corrupt: {error}") from error


def blank_module(name: str, entry: Mapping[str, Any]) -> nn.Module:
    """Return the host of a compressed layer on the meta device, in float32.

    Raises:
        EckartError: if the entry is not a valid spec; the layer is named.
    """
    map_ = blank_map(name, entry, torch.float32)
    if entry["kind"] == EMBEDDING:
        return embedding_host(map_, entry.get("padding_idx"))
    return host(map_, torch.empty(map_.shape[0], device="meta") if entry["bias"] else None)


def expected_tensors(layers: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that the compressed layers of a folder must have, by full name.

    Raises:
        EckartError: if a spec is invalid, or a layer takes a tensor from one that does not have it.
    """
    shapes = {
        name: {key: tuple(tensor.shape) for key, tensor in blank_module(name, entry).state_dict().items()}
        for name, entry in layers.items()
        if entry["kind"] != TIED_HEAD
    }
    check_sharing(layers, shapes)
    return {stored_name(name, layers[name], key): shape for name, own in shapes.items() for key, shape in own.items()}


def check_files(files: Iterable[str] | str | None, layers: Mapping[str, Any]) -> None:
    """Check the headers of safetensors files against the specs, before anything is allocated.

    Raises:
        EckartError: if a tensor is missing or has another shape than its spec says.
    """
    if not files:
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for file in [files] if isinstance(files, str) else files:
        with safe_open(file, "pt") as handle:
            shapes.update({name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()})  # noqa: SIM118
    folder = Path(file).parent
    for name, shape in expected_tensors(layers).items():
        if name not in shapes:
            raise EckartError(f"{folder} lacks the tensor {name} that its config describes; the folder is incomplete")
        if shapes[name] != shape:
            raise EckartError(f"tensor {name} in {folder} has shape {shapes[name]}, but its spec says {shape}")


def densify_hosts(model: nn.Module, layers: Mapping[str, Any], conv1d: Collection[str] = ()) -> nn.Module:
    """Replace hosts by the dense layers they stand for, in place; a tied head is tied again.

    Args:
        model: the model.
        layers: the entries of its compressed layers.
        conv1d: names of those that stand for the transposed `Conv1D` of transformers.
    """
    for name, entry in layers.items():
        module = model.get_submodule(name)
        if isinstance(module, EmbeddingHost):
            weight = module.dense().detach().contiguous()
            dense: nn.Module = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=module.padding_idx)
        elif isinstance(module, Host) or "neurons" in entry:
            dense = _dense_layer(module, entry, name in conv1d)
        else:
            continue
        replace(model, name, dense)
    for name, entry in layers.items():
        if entry["kind"] == TIED_HEAD:
            head, embedding = model.get_submodule(name), model.get_submodule(entry["embedding"])
            bias = getattr(head, "bias", None)
            dense = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=bias is not None, device="meta")  # type: ignore[arg-type]
            dense.weight = embedding.weight  # type: ignore[assignment]
            if bias is not None:
                dense.bias = bias
            replace(model, name, dense)
            model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    return model


def _dense_layer(module: nn.Module, entry: Mapping[str, Any], conv1d: bool) -> nn.Module:
    """Return the dense layer that a host, or a layer with fewer hidden units, stands for."""
    weight, offset = padded(entry, map_of(module).dense().detach()).contiguous(), offset_of(module)
    bias = None if offset is None else padded(entry, offset.detach().clone())
    if not conv1d:
        return leaf(weight, bias)
    dense: nn.Module = Conv1D(1, 1)
    dense.nf, dense.nx = weight.shape  # type: ignore[assignment]
    dense.weight = nn.Parameter(weight.mT.contiguous())
    dense.bias = nn.Parameter(torch.zeros_like(weight[:, 0]) if bias is None else bias)
    return dense


def register() -> None:
    """Register quantizer and config with transformers; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(EckartQuantizer)
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(EckartConfig)


register()
