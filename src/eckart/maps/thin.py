"""Maps that are low-rank by their structure, as the product of two thin matrices: many inputs then cost the least."""

from typing import cast

import torch
from torch import Tensor

from eckart.maps.base import LinearMap, Product, Sum
from eckart.maps.dense import Dense, Diagonal
from eckart.maps.hadamard import Hadamard
from eckart.maps.lowrank import LowRank
from eckart.maps.tensor_train import TensorTrain

# How many times fewer columns than the matrix has a product of two low ranks must need. Forward and backward its thin
# factors take three products of their own, a matrix that is written into another's product one, for its gradient.
NARROWER = 8


def thin(map_: LinearMap) -> LowRank | None:
    """Return a map as two thin matrices where its structure gives them; else None.

    That is so for L diag(s) R, for a tensor train through all rows and then all columns, and for the product of two low
    ranks entry by entry, (A B) * (C D) = (A . C) (B . D), where A . C is every column of A times every one of C and
    B . D likewise by rows, if these are few.
    """
    match map_:
        case Hadamard(LowRank(a, b), LowRank(c, d)) if NARROWER * b.shape[0] * d.shape[0] <= min(map_.shape):
            return LowRank((a[:, :, None] * c[:, None]).flatten(1), (b[:, None] * d).flatten(0, 1))
        case Product(maps=(Dense(weight=up), Diagonal(scale=selector), Dense(weight=down))):
            return LowRank(up * selector, down)
        case TensorTrain():
            return map_.lowrank()
        case _:
            return None


def fixed_vectors(start: LinearMap, moved: LinearMap) -> list[tuple[Tensor, Tensor]] | None:
    """Return what has to be equal for `difference_of_vectors`, pair by pair; None where the maps are others.

    Args:
        start: L diag(s) R.
        moved: (L + A B) diag(s) (R + C D).
    """
    match start, moved:
        case Product((Dense() as left, Diagonal() as values, Dense() as right)), Product(
            (own_left, own_values, own_right)
        ):
            pass
        case _:
            return None
    match own_left, own_values, own_right:
        case Sum((Dense() as l, LowRank())), Diagonal() as s, Sum((Dense() as r, LowRank())):
            return [(left.weight, l.weight), (values.scale, s.scale), (right.weight, r.weight)]
        case _:
            return None


def difference_of_vectors(moved: Product) -> LowRank:
    """Return (L + A B) diag(s) (R + C D) - L diag(s) R = [L diag(s) C, A] [D; B diag(s) (R + C D)]."""
    left, values, right = cast(tuple[Sum, Diagonal, Sum], moved.maps)
    (own_left, of_left), (own_right, of_right) = (cast(tuple[Dense, LowRank], each.maps) for each in (left, right))
    inside = of_left.down * values.scale
    up = torch.cat((own_left.weight @ (values.scale[:, None] * of_right.up), of_left.up), dim=1)
    down = inside @ own_right.weight + (inside @ of_right.up) @ of_right.down
    return LowRank(up, torch.cat((of_right.down, down)))
