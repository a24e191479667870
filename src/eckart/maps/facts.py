"""What is known of a map from its structure alone, and how it closes under the algebra.

A fact is only claimed where every instance has it. Each is tested on dense matrices, also after -A, 2 A, A + B, A B.
"""

from enum import Enum

from eckart.maps.base import Blocks, LinearMap, Product, Scaled, Sum
from eckart.maps.dense import Diagonal
from eckart.maps.hadamard import Hadamard
from eckart.maps.kronecker import Kronecker
from eckart.maps.lowrank import LowRank
from eckart.maps.masked import Masked
from eckart.maps.normalized import RowNormalized
from eckart.maps.orthogonal import Cayley, Householder
from eckart.maps.permutation import Permutation
from eckart.maps.pivoted import Pivoted


class Fact(Enum):
    """A property of the matrix W."""

    SYMMETRIC = "W = W^T"
    ORTHOGONAL = "W^T W = I"
    DIAGONAL = "W_ij = 0 for i != j"


S, O, D = Fact.SYMMETRIC, Fact.ORTHOGONAL, Fact.DIAGONAL

# What each leaf is, always.
OF_LEAF: dict[type[LinearMap], frozenset[Fact]] = {
    Diagonal: frozenset({S, D}),
    Permutation: frozenset({O}),
    Householder: frozenset({O}),
    Cayley: frozenset({O}),
}
# Which facts of all terms a sum keeps: orthogonality is lost (I + I is not orthogonal).
KEPT_BY_SUM = frozenset({S, D})
# Which facts of all factors a product keeps: symmetry is lost (A B is not symmetric unless they commute).
KEPT_BY_PRODUCT = frozenset({O, D})
# Which facts a multiple keeps: orthogonality only for a factor of 1 or -1.
KEPT_BY_SCALE = frozenset({S, D})


def facts(map_: LinearMap) -> frozenset[Fact]:
    """Return every fact that the structure of the map guarantees."""
    match map_:
        case Sum(maps):
            found = frozenset.intersection(*map(facts, maps)) & KEPT_BY_SUM
        case Product(maps):
            found = frozenset.intersection(*map(facts, maps))
            found = found & KEPT_BY_PRODUCT if len(maps) > 1 else found
        case Scaled(inner, scale):
            found = facts(inner) if abs(scale) == 1 else facts(inner) & KEPT_BY_SCALE
        case Masked(inner, _):
            found = facts(inner) & {D}  # an asymmetric mask breaks symmetry, any mask keeps zeros
        case RowNormalized(_, direction):
            found = facts(direction) & {D}
        case Hadamard(left, right):
            found = ((facts(left) | facts(right)) & {D}) | (facts(left) & facts(right) & {S})
        case Blocks(grid):
            found = facts(grid[0][0]) if len(grid) == len(grid[0]) == 1 else frozenset()
        case _:
            found = OF_LEAF.get(type(map_), frozenset())
    return found | {S} if D in found else found


def rank_bound(map_: LinearMap) -> int:
    """Return the smallest r such that the structure guarantees rank W <= r.

    rank(A + B) <= rank A + rank B; rank(A B) <= min(rank A, rank B); a non-zero multiple keeps the rank;
    rank(A (x) B) = rank A rank B, and rank(A * B) is at most that.
    """
    full = min(map_.shape)
    match map_:
        case LowRank() | Pivoted():
            return min(map_.rank, full)
        case Kronecker(left, right):
            return min(full, left.shape[0] * min(left.shape[1:]) * min(right.shape[1:]))
        case Hadamard(left, right):
            return min(full, rank_bound(left) * rank_bound(right))
        case Sum(maps):
            return min(full, sum(map(rank_bound, maps)))
        case Product(maps):
            return min(map(rank_bound, maps))
        case Scaled(inner, scale):
            return rank_bound(inner) if scale != 0 else 0
        case RowNormalized(_, direction):
            return rank_bound(direction)
        case Blocks(grid):
            return min(full, sum(rank_bound(block) for row in grid for block in row))
        case _:
            return full
