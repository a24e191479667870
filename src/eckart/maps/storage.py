"""The ways to store a map of given rank: how many numbers each takes, and how to make it from two factors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eckart.errors import EckartError
from eckart.maps.base import LinearMap
from eckart.maps.lowrank import LowRank, lowrank_numbers, random_lowrank
from eckart.maps.pivoted import pivot, pivoted_numbers, random_pivoted


@dataclass(frozen=True, slots=True)
class Storage:
    """One way to store a matrix (m, n) of rank k.

    Attributes:
        name: as users write it.
        numbers: (shape, rank) -> floating numbers stored.
        index_bytes: (shape, rank) -> bytes of index tensors.
        build: makes the stored map from a `LowRank`.
        example: (shape, rank, device) -> a stored map with random numbers.
    """

    name: str
    numbers: Callable[[tuple[int, int], int], int]
    index_bytes: Callable[[tuple[int, int], int], int]
    build: Callable[[LowRank], LinearMap]
    example: Callable[[tuple[int, int], int, torch.device], LinearMap]

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


STORAGES: dict[str, Storage] = {
    s.name: s
    for s in (
        Storage("lowrank", lowrank_numbers, lambda shape, rank: 0, lambda factors: factors, random_lowrank),
        Storage("pivoted", pivoted_numbers, lambda shape, rank: 4 * min(shape), pivot, random_pivoted),
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
