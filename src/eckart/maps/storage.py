"""The ways to store a map of given rank: how many numbers each takes, and how to make it from two factors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.maps.base import LinearMap
from eckart.maps.lowrank import LowRank, lowrank_numbers
from eckart.maps.pivoted import Pivoted, pivot, pivoted_numbers


@dataclass(frozen=True, slots=True)
class Storage:
    """One way to store a matrix (m, n) of rank k.

    Attributes:
        name: as users write it.
        numbers: (shape, rank) -> floating numbers stored.
        index_bytes: (shape, rank) -> bytes of index tensors.
        build: makes the stored map from a `LowRank`.
        blank: (shape, rank) -> the map that would be built, on the meta device.
    """

    name: str
    numbers: Callable[[tuple[int, int], int], int]
    index_bytes: Callable[[tuple[int, int], int], int]
    build: Callable[[LowRank], LinearMap]
    blank: Callable[[tuple[int, int], int], LinearMap]

    def largest(self, shape: tuple[int, int]) -> int:
        """Return the largest rank there is."""
        return min(shape)

    def largest_rank(self, shape: tuple[int, int], numbers: float) -> int:
        """Return the largest rank whose storage takes at most that many numbers (0 if none does)."""
        low, high = 0, min(shape)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.numbers(shape, middle) <= numbers else (low, middle - 1)
        return low


def _blank_lowrank(shape: tuple[int, int], rank: int) -> LinearMap:
    return LowRank(_empty(shape[0], rank), _empty(rank, shape[1]))


def _blank_pivoted(shape: tuple[int, int], rank: int) -> LinearMap:
    m, n = shape
    order = torch.empty(min(shape), dtype=torch.int32, device="meta")
    if m <= n:
        return Pivoted(_empty(rank, n), _empty(m - rank, rank), order, "rows")
    return Pivoted(_empty(m, rank), _empty(rank, n - rank), order, "columns")


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


STORAGES: dict[str, Storage] = {
    s.name: s
    for s in (
        Storage("lowrank", lowrank_numbers, lambda shape, rank: 0, lambda factors: factors, _blank_lowrank),
        Storage("pivoted", pivoted_numbers, lambda shape, rank: 4 * min(shape), pivot, _blank_pivoted),
    )
}


def storage(name: str) -> Storage:
    """Return a storage by name.

    Raises:
        EckartError: if there is none of that name.
    """
    if name not in STORAGES:
        raise EckartError(f"unknown storage {name!r}; choose one of {', '.join(STORAGES)}")
    return STORAGES[name]


def stored(factors: LowRank, name: str, *, table: bool = False) -> LinearMap:
    """Return a low-rank map as a storage keeps it.

    Args:
        factors: the map.
        name: name of the storage.
        table: whether it is an embedding, whose pivots are columns: one row of numbers is looked up per token.
    """
    if table and name == "pivoted":
        return pivot(factors, "columns")
    return storage(name).build(factors)
