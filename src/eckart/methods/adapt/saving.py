"""Saving an adapter: as eckart's own folder, which holds all of it, or as PEFT's, which other tools read.

What PEFT's terms for a layer are is in peft_layers.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.files.adapters import StoredAdapter, StoredLayer, sketch, write_adapter
from eckart.files.peft import HIRA, IA3, LOHA, LOKR, LORA, OFT, SHIRA, PeftAdapter, lokr_factor, rank_of, write_peft
from eckart.hosts import AdaptedHost, Adapter, is_conv1d, is_convolution, is_linear, map_of, offset_of
from eckart.maps import row_norms
from eckart.methods.adapt.changes import stored_change
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.peft_layers import OWN, to_peft

Format = Literal["eckart", "peft"]


def save_adapter(
    model: nn.Module,
    layers: Mapping[str, AdaptedHost],
    name: str,
    described: Described,
    folder: Path,
    form: Format,
) -> None:
    """Write an adapter's folder, whole or not at all.

    Args:
        model: the adapted model.
        layers: its adapted layers by name.
        name: the adapter.
        described: how it was made.
        folder: where; must not hold anything yet.
        form: "eckart" or "peft".

    Raises:
        EckartError: if the folder cannot be written, or the format cannot express the adapter.
    """
    if form not in ("eckart", "peft"):
        raise EckartError(f'format must be "eckart" or "peft", got {form!r}')
    own = {layer: module for layer, module in layers.items() if name in module.adapters}
    trained = {head: _state(model, head, layers) for head in described.trained}
    if form == "eckart":
        stored = {layer: _stored(module, name) for layer, module in own.items()}
        settings, seed = described.settings, described.seed
        write_adapter(folder, StoredAdapter(name, described.method, settings, seed, stored, trained))
        return
    modules = [n for n, _ in model.named_modules() if not any(n.startswith(f"{layer}.") for layer in layers)]
    for head in trained:
        wrong = [n for n in modules if n.endswith(head) and n != head and not n.startswith(f"{head}.")]
        if wrong:
            raise EckartError(f"PEFT would take {wrong[0]} for the trained module {head} as well; {OWN}")
    adapter = in_peft_terms({layer: (module.base, module.adapter(name)) for layer, module in own.items()}, trained)
    write_peft(
        folder,
        adapter,
        modules,
        base=getattr(model, "name_or_path", None),
        causal=type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")),
        transposed=any(is_conv1d(module.base) for module in own.values()),
    )


def _state(model: nn.Module, head: str, layers: Mapping[str, AdaptedHost]) -> dict[str, Tensor]:
    inside = next((layer for layer in layers if f"{layer}.".startswith(f"{head}.")), None)
    if inside is not None:
        raise EckartError(f"{head} trains whole and holds the adapted layer {inside}; save the whole model instead")
    return {key: tensor.detach().clone() for key, tensor in model.get_submodule(head).state_dict().items()}


def _stored(layer: AdaptedHost, name: str) -> StoredLayer:
    base, adapter = map_of(layer.base), layer.adapter(name)
    trained = {id(parameter) for parameter in adapter.trained()}
    changes = []
    for change in adapter.chain():
        frozen = tuple(key for key, parameter in change.named_parameters() if id(parameter) not in trained)
        changes.append(stored_change(change, base, frozen))
    return StoredLayer(base.shape, sketch(base), tuple(changes))


@torch.no_grad()
def in_peft_terms(
    layers: Mapping[str, tuple[nn.Module, Adapter]], trained: Mapping[str, Mapping[str, Tensor]]
) -> PeftAdapter:
    """Return an adapter as PEFT saves it, given base and adapter of each layer, and states of what trains whole.

    Raises:
        EckartError: if PEFT has no type that computes the same.
    """
    kinds, scales, dropouts = {}, {}, {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, (base, adapter) in layers.items():
        if is_convolution(base):
            raise EckartError(f"{name} is a convolution, which is not written in PEFT's format; {OWN}")
        kinds[name], tensors[name], scales[name], dropouts[name] = to_peft(name, adapter)
        if not is_linear(base) or (is_conv1d(base) and kinds[name] != LORA):
            raise EckartError(f"PEFT has no {kinds[name]} for a {type(base).__name__}, which {name} is; {OWN}")
        if kinds[name] == IA3 and offset_of(base) is not None and tensors[name]["ia3_l"].shape[0] > 1:
            raise EckartError(f"PEFT's IA3 would scale the bias of {name} as well; {OWN}")
        if "lora_magnitude_vector" in tensors[name]:
            _check_rows(name, base, Adapter(adapter.chain()[:-1]))
    _same("the type", kinds)
    _same("the dropout", dropouts)
    kind, dropout = next(iter(kinds.values())), next(iter(dropouts.values()))
    rest = {f"{head}.{key}": tensor for head, state in trained.items() for key, tensor in state.items()}
    ranks = _ranks(kind, tensors, {name: map_of(base).shape for name, (base, _) in layers.items()})
    alphas = {name: scale * ranks[name] for name, scale in scales.items()} if kind in (LORA, LOHA, LOKR) else {}
    known = ranks if kind in (LOKR, SHIRA) else {}
    made = PeftAdapter(kind, tensors, alphas, dropout, tuple(trained), rest, ranks=known)
    if kind == LORA:
        _same("rescaling", {name: "lora_magnitude_vector" in own for name, own in tensors.items()})
    elif kind == LOKR:
        lokr_factor(made)
    elif kind not in (LOHA, HIRA):
        _same("the rank or block", ranks)
    return made


def _ranks(
    kind: str, tensors: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Return what PEFT's config calls the rank or the block of every layer; 0 where a type has none.

    Raises:
        EckartError: if as many sparse entries as there are stand for no rank.
    """
    out = {name: rank_of(kind, own) for name, own in tensors.items()}
    for name, own in tensors.items():
        if kind == OFT:
            out[name] = own["oft_R.weight"].shape[1]
        elif kind == LOKR:  # the least from which PEFT keeps the second factor whole
            out[name] = -(-max(max(t["lokr_w2"].shape) for t in tensors.values()) // 2)
        elif kind == SHIRA:
            count, sides = own["shira_weight"].shape[0], sum(shapes[name])
            if count % sides or not count:
                raise EckartError(f"PEFT's SHIRA has a multiple of {sides} entries in {name}, not {count}; {OWN}")
            out[name] = count // sides
    return out


def _check_rows(name: str, base: nn.Module, adapter: Adapter) -> None:
    """Refuse rows of zeros, such as that of a padding token: PEFT divides by their length."""
    count = int((row_norms(adapter.of(map_of(base))) == 0).sum())
    if count:
        raise EckartError(f"{count} rows of {name} are zero, and PEFT divides by their length; {OWN}")


def _same(what: str, values: Mapping[str, object]) -> None:
    """Raise an `EckartError` if layers differ in what PEFT has one value of."""
    (name, value), *others = values.items()
    other = next((n for n, v in others if v != value), None)
    if other is not None:
        raise EckartError(f"{what} differs between {name} and {other}, and PEFT knows one for all layers; {OWN}")
