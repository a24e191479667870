"""Saving an adapter: as eckart's own folder, which holds all of it, or as PEFT's, which other tools read.

In PEFT's terms, exactly:

    low rank, thin products, sums of them   LORA: sum_i s_i B_i A_i = s [B_1 s_1/s, B_2 s_2/s, ...] [A_1; A_2; ...]
    the same, rows rescaled                 LORA with use_dora
    tiles                                   MISS
    reflections                             HRA
    rotations of blocks                     OFT without Cayley-Neumann

What is frozen, and what a rule does to gradients, PEFT's format does not know: trained further there, all factors move.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.files.adapters import StoredAdapter, StoredLayer, sketch, write_adapter
from eckart.files.peft import HRA, LORA, MISS, OFT, PeftAdapter, write_peft
from eckart.hosts import AdaptedHost, Adapter, is_conv1d, is_linear, map_of
from eckart.hosts.adapter import Change, Plus, Rescaled, Times
from eckart.maps import Cayley, Dense, Diagonal, Householder, LinearMap, LowRank, Product, Scaled, Sum, Tiled, row_norms
from eckart.methods.adapt.changes import stored_change
from eckart.methods.adapt.described import Described

Format = Literal["eckart", "peft"]
OWN = 'save it with format="eckart"'


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
    kinds, dropouts = {}, {}
    tensors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, (base, adapter) in layers.items():
        kinds[name], tensors[name], scale, dropouts[name] = _peft_layer(name, adapter)
        if not is_linear(base) or (is_conv1d(base) and kinds[name] != LORA):
            raise EckartError(f"PEFT has no {kinds[name]} for a {type(base).__name__}, which {name} is; {OWN}")
        if kinds[name] == LORA:
            alphas[name] = scale * tensors[name]["lora_A.weight"].shape[0]
        if "lora_magnitude_vector" in tensors[name]:
            _check_rows(name, base, Adapter(adapter.chain()[:-1]))
    _same("the type", kinds)
    _same("the dropout", dropouts)
    kind, dropout = next(iter(kinds.values())), next(iter(dropouts.values()))
    if kind == LORA:
        _same("rescaling", {name: "lora_magnitude_vector" in own for name, own in tensors.items()})
    else:
        axis = {MISS: 0, HRA: 1, OFT: 1}[kind]
        _same("the rank or block", {name: next(iter(own.values())).shape[axis] for name, own in tensors.items()})
    rest = {f"{head}.{key}": tensor for head, state in trained.items() for key, tensor in state.items()}
    return PeftAdapter(kind, tensors, alphas, dropout, tuple(trained), rest)


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


def _peft_layer(name: str, adapter: Adapter) -> tuple[str, dict[str, Tensor], float, float]:
    """Return the type, the tensors, the scale and the dropout of a layer."""
    match adapter.chain():
        case [Plus(delta=delta, scale=scale) as plus] if isinstance(map_of(delta), Tiled):
            tile = cast(Tiled, map_of(delta)).tile
            return MISS, {"miss_block": scale * tile.mT}, 1.0, _dropout([plus])
        case [Times(right=right)] if isinstance(map_of(right), Householder):
            return HRA, {"hra_u": cast(Householder, map_of(right)).vectors.mT}, 1.0, 0.0
        case [Times(right=right)] if isinstance(map_of(right), Cayley):
            return OFT, {"oft_R.weight": cast(Cayley, map_of(right)).skew}, 1.0, 0.0
        case [*changes, Rescaled(magnitude=magnitude)] if changes:
            rescaled = {"lora_magnitude_vector": magnitude}
        case changes:
            rescaled = {}
    sums = [change for change in changes if isinstance(change, Plus)]
    pairs = [thin_factors(map_of(change.delta)) for change in sums]
    if len(sums) != len(changes) or any(pair is None for pair in pairs):
        found = " then ".join(_word(change) for change in adapter.chain())
        raise EckartError(f"PEFT has no type for {found}, which {name} has; {OWN}")
    scale = next((change.scale for change in reversed(sums) if change.scale), 1.0)
    weighted = [(pair[0] * (change.scale / scale), pair[1]) for pair, change in zip(pairs, sums, strict=True) if pair]
    up, down = torch.cat([up for up, _ in weighted], 1), torch.cat([down for _, down in weighted])
    return LORA, {"lora_A.weight": down, "lora_B.weight": up, **rescaled}, scale, _dropout(sums)


def _dropout(changes: Sequence[Plus]) -> float:
    return max(0.0 if change.dropout is None else change.dropout.p for change in changes)


def _word(change: Change) -> str:
    held = change.delta if isinstance(change, Plus) else change.right if isinstance(change, Times) else None
    inner = f" of a {type(map_of(held)).__name__}" if held is not None else ""
    return f"{type(change).__name__}{inner}"


def thin_factors(map_: LinearMap) -> tuple[Tensor, Tensor] | None:
    """Return U (m, r) and V (r, n) with U V the map, r the least inner size of its structure; None if it has none."""
    match map_:
        case LowRank(up, down):
            return up, down
        case Scaled(inner, scale):
            pair = thin_factors(inner)
            return None if pair is None else (pair[0] * scale, pair[1])
        case Sum(maps):
            parts = [pair for pair in map(thin_factors, maps) if pair is not None]
            if len(parts) < len(maps):
                return None
            return torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts])
        case Product(maps) if len(maps) > 1 and all(isinstance(part, (Dense, Diagonal, LowRank)) for part in maps):
            cut = min(range(1, len(maps)), key=lambda i: maps[i].shape[0])
            sides = [Product(part).to(torch.float64).dense() for part in (maps[:cut], maps[cut:])]
            return sides[0].to(map_.dtype), sides[1].to(map_.dtype)
        case _:
            return None
