"""The changes of adapters, between the modules that compute and train and what is on disk."""

from typing import cast

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.files.changes import (
    GROUPED,
    KERNEL,
    LEFT,
    MASKED,
    MULTIPLIED,
    PLUS,
    RESCALED,
    ROUTED,
    TIMES,
    StoredChange,
    digest_of,
)
from eckart.hosts import map_of
from eckart.hosts.adapter import Change, Left, Plus, Rescaled, Times
from eckart.hosts.entrywise import ElasticFactors, Grouped, Kernel, MaskedFactors, Multiplied
from eckart.hosts.routed import Routed
from eckart.maps import Diagonal, LinearMap, packed


def support_of(base: LinearMap) -> Tensor:
    """Return where a map is not 0 as bits, (m, ceil(n / 8)) uint8."""
    return packed(base.dense().detach() != 0)


def stored_change(change: Change, base: LinearMap, frozen: tuple[str, ...]) -> StoredChange:
    """Return a change as it is stored.

    Args:
        change: the change.
        base: the map of its layer, whose support a masked change need not store.
        frozen: parameters of it that never train.

    Raises:
        EckartError: if it is of a type that has no kind.
    """
    match change:
        case Plus():
            dropout = 0.0 if change.dropout is None else change.dropout.p
            return StoredChange(PLUS, _map(change.delta), change.scale, dropout, frozen)
        case Times():
            return StoredChange(TIMES, _map(change.right), frozen=frozen)
        case Left():
            return StoredChange(LEFT, _map(change.left), frozen=frozen)
        case Rescaled():
            return StoredChange(RESCALED, Diagonal(change.magnitude.detach()), frozen=frozen)
        case Multiplied():
            return StoredChange(MULTIPLIED, _map(change.factor), change.scale, frozen=frozen)
        case Grouped():
            held = _held(change, "of_columns", "of_rows")
            return StoredChange(GROUPED, scale=change.scale, frozen=frozen, tensors=held)
        case MaskedFactors():
            held, support = _held(change, "up", "down"), ""
            if torch.equal(support_of(base), change.bits):
                support = digest_of(change.bits)
            else:
                held["bits"] = change.bits
            numbers = {"elastic": float(isinstance(change, ElasticFactors))}
            return StoredChange(MASKED, None, change.scale, 0.0, frozen, held, numbers, support)
        case Kernel():
            held = _held(change, "inputs", "outputs")
            return StoredChange(KERNEL, None, change.scale, 0.0, frozen, held, {"density": change.density})
        case Routed():
            held, numbers = _held(change, "up", "bias"), {"kept": float(change.kept), "balance": change.balance}
            return StoredChange(ROUTED, _map(change.down), change.scale, 0.0, frozen, held, numbers)
        case _:
            raise EckartError(f"a change of type {type(change).__name__} has no format; remove the adapter to go on")


def made_change(layer: str, stored: StoredChange, base: LinearMap) -> Change:
    """Return the change that was stored, frozen where it was.

    Args:
        layer: name of its layer.
        stored: what was read.
        base: the map of the layer.

    Raises:
        EckartError: if the base's support is not the one trained on, or what is frozen is not there.
    """
    change = _made(layer, stored, base)
    parameters = dict(change.named_parameters())
    unknown = next((key for key in stored.frozen if key not in parameters), None)
    if unknown is not None:
        raise EckartError(f"the adapter of {layer} freezes {unknown}, which it does not have; copy the folder again")
    for key in stored.frozen:
        parameters[key].requires_grad_(False)
    return change


def _made(layer: str, stored: StoredChange, base: LinearMap) -> Change:
    held, numbers, scale, map_ = stored.tensors, stored.numbers, stored.scale, cast(LinearMap, stored.map)
    match stored.kind:
        case "plus":
            return Plus(map_, scale, dropout=stored.dropout)
        case "times":
            return Times(map_)
        case "left":
            return Left(map_)
        case "rescaled":
            return Rescaled(cast(Diagonal, map_).scale)
        case "multiplied":
            return Multiplied(map_, scale)
        case "grouped":
            return Grouped(held["of_columns"], held["of_rows"], scale)
        case "masked":
            kind = ElasticFactors if numbers["elastic"] else MaskedFactors
            return kind(held["up"], held["down"], _support(layer, stored, base), scale)
        case "kernel":
            return Kernel(held["inputs"], held["outputs"], numbers["density"])
        case _:
            return Routed(held["up"], map_, int(numbers["kept"]), scale, numbers["balance"], held["bias"])


def _support(layer: str, stored: StoredChange, base: LinearMap) -> Tensor:
    """Return the bits of a mask: those stored, or where the base is not 0 if that is what was trained on."""
    if "bits" in stored.tensors:
        return stored.tensors["bits"]
    bits = support_of(base)
    if digest_of(bits) != stored.support:
        raise EckartError(
            f"the adapter of {layer} was trained where the weights of its base are not 0, and these are 0 elsewhere, "
            "as in another dtype or in codes; load it on its own base"
        )
    return bits


def _map(module: nn.Module) -> LinearMap:
    return map_of(module).apply(torch.detach)


def _held(change: nn.Module, *names: str) -> dict[str, Tensor]:
    return {name: cast(Tensor, getattr(change, name)).detach() for name in names}
