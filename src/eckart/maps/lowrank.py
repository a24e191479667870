"""A product of two thin matrices."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maps.base import LinearMap, linear_map, require


@linear_map
class LowRank(LinearMap):
    """W = up @ down, of rank k at most, in k (m + n) numbers.

    Attributes:
        up: (m, k).
        down: (k, n), applied first.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        came = f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)}"
        fits = self.up.ndim == 2 and self.down.ndim == 2 and self.up.shape[1] == self.down.shape[0]
        require(fits, "LowRank", came, "(m, k) and (k, n)")

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """The inner size k."""
        return self.down.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)

    @property
    def T(self) -> LinearMap:
        return LowRank(self.down.mT, self.up.mT)

    def dense(self) -> Tensor:
        return self.up @ self.down

    def dense_flops(self) -> int:
        return 2 * self.up.numel() * self.shape[1]


def lowrank_numbers(shape: tuple[int, int], rank: int) -> int:
    """Return the numbers a `LowRank` of that shape and rank stores: k (m + n)."""
    return rank * (shape[0] + shape[1])


def random_lowrank(shape: tuple[int, int], rank: int, device: torch.device | None = None) -> LowRank:
    """Return a `LowRank` of a shape and rank with random numbers, for what depends on sizes alone."""
    return LowRank(torch.randn(shape[0], rank, device=device), torch.randn(rank, shape[1], device=device))


def zero_map(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> LowRank:
    """Return the zero map of a shape: a low-rank map of rank 0, which stores nothing."""
    return LowRank(torch.zeros(shape[0], 0, dtype=dtype), torch.zeros(0, shape[1], dtype=dtype))
