"""Lengths of the rows of W without forming W, where the structure allows; rules read downward."""

import warnings

import torch
from torch import Tensor

from eckart.errors import CostWarning
from eckart.maps.base import LinearMap, Product, Scaled, Sum, in_one_dtype
from eckart.maps.dense import Dense, Diagonal
from eckart.maps.lowrank import LowRank, random_lowrank
from eckart.maps.orthogonal import Cayley, Householder
from eckart.maps.permutation import Permutation
from eckart.maps.pivoted import Pivoted


def row_norms(map_: LinearMap) -> Tensor:
    """Return the Euclidean length of every row of W, (m,).

    |row i of U V|^2 = u_i (V V^T) u_i^T; |a W| = |a| |W|; |row of W + U V|^2 adds the cross term 2 u_i . (W V^T)_i
    (the factored norm of Scaling DoRA); |row of W R| = |row of W| for an orthogonal R. Anything else is formed densely,
    with a `CostWarning`. Of a W in half precision no wide copy is made, and W + U V may be of two dtypes.
    """
    return squared_row_norms(map_).clamp_min(0).sqrt()


def squared_row_norms(map_: LinearMap) -> Tensor:
    """Return the squared Euclidean length of every row of W, (m,)."""
    match map_:
        case Dense(weight):
            if weight.dtype == torch.promote_types(weight.dtype, torch.float32):
                return weight.square().sum(1)
            lengths: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)  # makes no wide copy
            return lengths.square()
        case Diagonal(scale):
            return scale.square()
        case Permutation(order):
            return torch.ones(order.shape[0], device=order.device)
        case LowRank(up, down):
            return ((up @ (down @ down.mT)) * up).sum(1)
        case Pivoted():
            return squared_row_norms(map_.lowrank())
        case Scaled(inner, scale):
            return scale**2 * squared_row_norms(inner)
        case Product((*rest, Permutation() | Householder() | Cayley())) if rest:
            return squared_row_norms(rest[0] if len(rest) == 1 else Product(tuple(rest)))
        case Sum((Sum((first, *inner)), *rest)):
            return squared_row_norms(Sum((first, *inner, *rest)))
        case Sum((first, *rest)) if rest and all(isinstance(term, LowRank) for term in rest):
            pairs = [(term.up, term.down) for term in rest if isinstance(term, LowRank)]
            up, down = torch.cat([u for u, _ in pairs], dim=1), torch.cat([v for _, v in pairs])
            cross = (_applied(first, down).mT * up).sum(1)  # first applied to the rows of down: (k, m)
            return squared_row_norms(first) + 2 * cross + squared_row_norms(LowRank(up, down))
        case _:
            what = f"row norms of {type(map_).__name__} {map_.shape}"
            warnings.warn(f"{what} need the dense matrix", CostWarning, stacklevel=2)
            return in_one_dtype(map_).dense().square().sum(1)


def _applied(map_: LinearMap, x: Tensor) -> Tensor:
    """Return a map of any dtypes applied to x."""
    alike = in_one_dtype(map_)
    return alike(x.to(alike.dtype))


def squared_row_norms_flops(map_: LinearMap) -> int:
    """Return the multiplications and additions of `squared_row_norms`, rule by rule."""
    m, n = map_.shape
    match map_:
        case Dense():
            return 2 * m * n
        case Diagonal():
            return m
        case Permutation():
            return 0
        case LowRank() | Pivoted():
            k = map_.rank
            return 2 * k * k * n + 2 * m * k * k + 2 * m * k
        case Scaled(inner, _):
            return squared_row_norms_flops(inner) + m
        case Product((*rest, Permutation() | Householder() | Cayley())) if rest:
            return squared_row_norms_flops(rest[0] if len(rest) == 1 else Product(tuple(rest)))
        case Sum((Sum((first, *inner)), *terms)):
            return squared_row_norms_flops(Sum((first, *inner, *terms)))
        case Sum((first, *terms)) if terms and all(isinstance(term, LowRank) for term in terms):
            k = sum(term.rank for term in terms if isinstance(term, LowRank))
            second = random_lowrank(map_.shape, k, torch.device("meta"))
            cross = first.flops(k) + 2 * m * k
            return squared_row_norms_flops(first) + cross + squared_row_norms_flops(second) + 3 * m
        case _:
            return map_.dense_flops() + 2 * m * n
