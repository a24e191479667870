"""Compressed folders as transformers load them: the quantizer that reads the format of `eckart.files.entries`."""

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from eckart.errors import EckartError, NumericalWarning
from eckart.files.elastic import Elastic, Slice, read_order, resized
from eckart.files.entries import (
    EMBEDDING,
    FORMAT,
    LINEAR,
    QUANT_METHOD,
    TIED_HEAD,
    EckartConfig,
    blank_map,
    check_files,
    sentinel_name,
)
from eckart.files.neurons import full_shape, padded
from eckart.files.sharing import (
    borrowed,
    renamed,
    tie,
    tied_keys,
    unlist_codes,
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
from eckart.maps import LowRank


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
        self._slices, self._elastic = self._resized(model, kwargs.get("checkpoint_files"))
        layers = localized(model, self.quantization_config.layers)
        check_files(kwargs.get("checkpoint_files"), self.quantization_config.layers)
        self._conv1d = {name for name in layers if is_conv1d(model.get_submodule(name))}
        self._without_bias = {name for name in layers if getattr(model.get_submodule(name), "bias", None) is None}
        insert_blank_hosts(model, layers)
        tied_keys(model, layers, tied=True)
        unlist_codes(model, layers)
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
        if self._elastic is not None:
            self._cut(model, self._elastic)
        # what is in memory has one size
        self.quantization_config.__dict__.pop("elastic", None)
        model.config.__dict__.pop("keep", None)
        return model

    def _resized(self, model: nn.Module, files: Any) -> tuple[dict[str, Slice], Elastic | None]:
        """Return what the layers become if the model is asked for at another size than the folder's, and its order."""
        stated = getattr(self.quantization_config, "elastic", None)
        keep = getattr(model.config, "keep", None)
        if stated is None or keep is None or keep == stated["largest"]:
            return {}, None
        elastic = read_order(Path(files[0] if not isinstance(files, str) else files).parent)
        return elastic.plan(keep), elastic

    @torch.no_grad()
    def _cut(self, model: nn.Module, elastic: Elastic) -> None:
        """Replace the layers of the folder's size by those of the size asked for."""
        entries = dict(self.quantization_config.layers)
        keep = float(model.config.keep)  # type: ignore[union-attr, arg-type]
        local = localized(model, {name: {"kind": LINEAR, "of": name} for name in self._slices})
        for name, of in ((name, entry["of"]) for name, entry in local.items()):
            if not self._slices[of].rank:
                continue
            map_, old = elastic.map(of, self._slices[of].rank, keep), model.get_submodule(name)
            entries[of] = elastic.entry(of, map_)
            self._conv1d |= {name} if is_conv1d(old) else set()
            replace(model, name, resized(name, old, map_, elastic.layer(of)))
        head = elastic.tied_head
        for of, entry in list(entries.items()):
            if entry["kind"] == EMBEDDING and head is not None:
                entries[head] = {"kind": TIED_HEAD, "embedding": of}
                model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        for name, entry in localized(model, entries).items():
            if entry["kind"] == TIED_HEAD:
                bias = getattr(model.get_submodule(name), "bias", None)
                replace(model, name, TiedHead(cast(EmbeddingHost, model.get_submodule(entry["embedding"])), bias))
        stated = self.quantization_config
        stated.layers, stated.sentinel = entries, sentinel_name(entries)
        stated.tied = any(entry["kind"] == TIED_HEAD for entry in entries.values())

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
