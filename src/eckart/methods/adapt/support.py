"""Which entries of a weight train, where only some do: scores of entries, and the sparse change on the chosen ones.

principal: |W_r|, W_r the best approximation of rank r     magnitude: |W|     small: -|W|     gradient: |dL/dW|
random: uniform
"""

from typing import Literal

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.hosts.adapter import Plus
from eckart.hosts.entrywise import MaskedFactors
from eckart.maps import packed, sparse_of
from eckart.methods.adapt.layer import Layer

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
