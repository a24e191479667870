"""Which entries of a weight train, where only some do: scores of entries, and the sparse change on the chosen ones.

principal: |W_r|, W_r the best approximation of rank r     magnitude: |W|     small: -|W|     gradient: |dL/dW|
random: uniform
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eckart.errors import EckartError
from eckart.hosts import Adapter, map_of
from eckart.hosts.adapter import Plus
from eckart.hosts.entrywise import MaskedFactors
from eckart.maps import Sparse, packed, sparse_of
from eckart.methods.adapt.layer import Layer
from eckart.optim import carry_over

Selector = Literal["principal", "magnitude", "small", "gradient", "random"]


def scores(layer: Layer, selector: Selector, rank: int = 0) -> Tensor:
    """Return the score of every entry of a weight, (m, n): the largest train.

    Args:
        layer: the layer.
        selector: what is scored.
        rank: r of "principal".
    """
    match selector:
        case "principal":
            found = layer.svd(layer.fitting(rank))
            return ((found.left * found.values) @ found.right).abs()
        case "magnitude":
            return layer.weight().abs()
        case "small":
            return -layer.weight().abs()
        case "gradient":
            return layer.weight_gradient().abs()
        case "random":
            return layer.uniform(*layer.shape)


def largest(layer: Layer, score: Tensor, count: int) -> Tensor:
    """Return where the largest scores are, (m, n) bool with `count` ones.

    Raises:
        EckartError: if there are fewer entries.
    """
    if count > score.numel():
        m, n = layer.shape
        raise EckartError(f"{count} entries are more than {layer.name} ({m} x {n}) has; train at most {m * n}")
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    chosen[score.flatten().topk(count, sorted=False).indices] = True
    return chosen.view_as(score)


def added_on(chosen: Tensor) -> Plus:
    """Return the change W + P, P zero at the start and zero for good outside of the places (m, n) that are True."""
    rows, columns = chosen.nonzero(as_tuple=True)
    values = torch.zeros(rows.shape[0], device=chosen.device)
    return Plus(sparse_of(rows, columns, values, (chosen.shape[0], chosen.shape[1])))


def masked(layer: Layer, rank: int, scale: float) -> MaskedFactors:
    """Return the change W + s M * (B A), M the support of W, with B = 0 and A as LoRA starts."""
    rank, n = layer.fitting(rank), layer.shape[1]
    up = torch.zeros(layer.shape[0], rank, device=layer.device)
    return MaskedFactors(up, layer.uniform(rank, n) / n**0.5, packed(layer.weight() != 0), scale)


def chosen_channels(layer: Layer, count: int, side: Literal["outputs", "inputs"], *, by_norm: bool = False) -> Tensor:
    """Return channels of one side of a layer, (count,) int32, ascending.

    Args:
        layer: the layer.
        count: how many.
        side: rows of the weight are its outputs, columns its inputs.
        by_norm: those of the largest norm; by default random ones, the same for all layers of one module that have
            as many, such as the outputs of the layers up and gate of an MLP and the inputs of its layer down.

    Raises:
        EckartError: if there are fewer.
    """
    axis = 0 if side == "outputs" else 1
    size = layer.shape[axis]
    if count > size:
        raise EckartError(f"{count} channels are more than the {size} {side} of {layer.name}; choose fewer")
    if by_norm:
        chosen = torch.linalg.vector_norm(layer.weight(), dim=1 - axis).topk(count).indices
    else:
        chosen = torch.randperm(size, generator=layer.generator(module=True))[:count]
    ascending: Tensor = chosen.sort().values.to(torch.int32)
    return ascending.to(layer.device)


def make_room(adapter: Adapter) -> None:
    """Give an adapter a frozen change F for learned values that are to stay as they are, unless it has one.

    Args:
        adapter: holds one trained change of a `Sparse` map.
    """
    trained = trained_values(adapter)
    if adapter.chain()[-1] is trained:
        held = cast(Sparse, map_of(trained.delta))
        none = torch.zeros(0, dtype=torch.int64, device=held.values.device)
        room = Plus(sparse_of(none, none, held.values.new_zeros(0), held.shape))
        room.delta.register_load_state_dict_pre_hook(_grow_for)
        adapter.fix(room)


def _grow_for(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Give a sparse map room for as many values as the state that is about to be loaded has."""
    for name in ("values", "columns"):
        own, found = cast(Tensor, getattr(module, name)), state.get(f"{prefix}{name}")
        if isinstance(found, Tensor) and found.ndim == 1 and found.shape != own.shape:
            own.data = own.new_zeros(found.shape)


def trained_values(adapter: Adapter) -> Plus:
    """Return the change of an adapter that trains."""
    own = {id(parameter) for parameter in adapter.trained()}
    return cast(Plus, next(c for c in adapter.chain() if any(id(p) in own for p in c.parameters())))


def places_of(map_: Sparse) -> Tensor:
    """Return the places of a sparse map's values, flat indices (nonzeros,) int64."""
    return map_.rows().long() * map_.width + map_.columns


def move_support(adapter: Adapter, chosen: Tensor, optimizer: Optimizer) -> None:
    """Let other entries train, as many as before, without changing the sum.

    Values at places that stay go on, with what the optimizer remembers of them; those at places that leave become part
    of F for good, and new ones start at zero.

    Args:
        adapter: with room, as `make_room` gives it.
        chosen: where values train from now on, (m, n) bool.
        optimizer: holds the values.
    """
    trained = trained_values(adapter).delta
    held = cast(Sparse, map_of(trained))
    old, new = places_of(held), chosen.flatten().nonzero().flatten()
    _leave(adapter, ~chosen.flatten()[old])
    at = torch.searchsorted(old, new).clamp_max(len(old) - 1)
    stays = old[at] == new
    carry_over(optimizer, trained.get_parameter("values"), lambda t: torch.where(stays, t[at], 0.0))
    _place(trained, new, held.shape)


def retire(adapter: Adapter, leaving: Tensor) -> None:
    """Take learned values out of training without changing the sum: they become part of F, and zero where they were.

    Args:
        adapter: with room, as `make_room` gives it.
        leaving: which of the values, (nonzeros,) bool.
    """
    _leave(adapter, leaving)
    trained_values(adapter).delta.get_parameter("values")[leaving] = 0


def _leave(adapter: Adapter, leaving: Tensor) -> None:
    """Add some of the trained values to F."""
    held, module = cast(Sparse, map_of(trained_values(adapter).delta)), cast(Plus, adapter.chain()[-1]).delta
    left = cast(Sparse, map_of(module))
    union, at = torch.cat((places_of(left), places_of(held)[leaving])).unique(return_inverse=True)
    values = torch.cat((left.values, held.values[leaving])).detach()
    module.get_parameter("values").data = values.new_zeros(len(union)).index_add(0, at, values)
    _place(module, union, left.shape)


def _place(module: nn.Module, places: Tensor, shape: tuple[int, int]) -> None:
    """Let the values of a sparse map stand at other places, flat and ascending."""
    values = module.get_parameter("values").detach()
    moved = sparse_of(places // shape[1], places % shape[1], values, shape)
    module.columns, module.starts = moved.columns, moved.starts
