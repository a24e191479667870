"""A reordering of channels."""

import torch
from torch import Tensor

from eckart.maps.base import LinearMap, linear_map, require


@linear_map
class Permutation(LinearMap):
    """y_i = x_{order[i]}.

    Attributes:
        order: (n,) int32 or int64, each index once.
    """

    order: Tensor

    def __post_init__(self) -> None:
        came = f"an order of shape {tuple(self.order.shape)} and dtype {self.order.dtype}"
        fits = self.order.ndim == 1 and self.order.dtype in (torch.int32, torch.int64)
        require(fits, "Permutation", came, "a vector of int32 or int64")

    @property
    def shape(self) -> tuple[int, int]:
        return self.order.shape[0], self.order.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order)

    @property
    def T(self) -> LinearMap:
        return Permutation(inverse_order(self.order))

    def validate(self) -> None:
        """Raise an `EckartError` unless every index appears once."""
        check_order("Permutation", self.order)

    def flops(self, tokens: int = 1) -> int:
        return 0


def check_order(operation: str, order: Tensor) -> None:
    """Raise an `EckartError` unless every index of an order (n,) appears once."""
    n = order.shape[0]
    found = torch.equal(order.long().sort().values, torch.arange(n, device=order.device))
    require(found, operation, "an order that misses or repeats an index", f"each of 0 to {n - 1} once")


def inverse_order(order: Tensor) -> Tensor:
    """Return the inverse of a permutation (n,), in its own dtype."""
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    return inverse
