"""Maps stored in full or with one number per channel: Dense and Diagonal."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maps.base import LinearMap, linear_map, require


@linear_map
class Dense(LinearMap):
    """W itself, stored in full.

    Attributes:
        weight: (out, in).
    """

    weight: Tensor

    def __post_init__(self) -> None:
        require(self.weight.ndim == 2, "Dense", f"a weight of shape {tuple(self.weight.shape)}", "a matrix")

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    @property
    def T(self) -> LinearMap:
        return Dense(self.weight.mT)

    def dense(self) -> Tensor:
        return self.weight.clone()

    def dense_flops(self) -> int:
        return 0


@linear_map
class Diagonal(LinearMap):
    """W = diag(scale).

    Attributes:
        scale: (n,), one factor per channel.
    """

    scale: Tensor

    def __post_init__(self) -> None:
        require(self.scale.ndim == 1, "Diagonal", f"a scale of shape {tuple(self.scale.shape)}", "a vector")

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale.shape[0], self.scale.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale

    @property
    def T(self) -> LinearMap:
        return self

    def dense(self) -> Tensor:
        return torch.diag(self.scale)

    def flops(self, tokens: int = 1) -> int:
        return tokens * self.scale.shape[0]

    def dense_flops(self) -> int:
        return 0
