"""The product of two maps entry by entry."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from eckart.maps.base import LinearMap, linear_map, require
from eckart.maps.recomputed import multiply_by_rows
from eckart.maps.rows import rows_of


@linear_map
class Hadamard(LinearMap):
    """W = A * B, entry by entry: of ranks a and b, a matrix of rank up to a b.

    W is written out in every call, a block of rows at a time, and never kept, not for backward either.

    Attributes:
        left: A (m, n).
        right: B (m, n).

    Source: Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning".
    """

    left: LinearMap
    right: LinearMap

    def __post_init__(self) -> None:
        came = f"shapes {self.left.shape} and {self.right.shape}"
        require(self.left.shape == self.right.shape, "Hadamard", came, "maps of one shape")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape

    def __call__(self, x: Tensor) -> Tensor:
        leaves, tree = pytree.tree_flatten(self)

        def rows(start: int, stop: int, tensors: Sequence[Tensor]) -> Tensor:
            return torch.mul(*cast(Hadamard, pytree.tree_unflatten(list(tensors), tree)).rows(start, stop))

        return multiply_by_rows(x, rows, leaves, self.shape[0])

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return some rows of A and of B, (stop - start, n) each, without the others wherever that is possible."""
        return rows_of(self.left, start, stop), rows_of(self.right, start, stop)

    @property
    def T(self) -> LinearMap:
        return Hadamard(self.left.T, self.right.T)

    def dense(self) -> Tensor:
        return torch.mul(self.left.dense(), self.right.dense())

    def flops(self, tokens: int = 1) -> int:
        return self.dense_flops() + 2 * tokens * math.prod(self.shape)

    def dense_flops(self) -> int:
        return self.left.dense_flops() + self.right.dense_flops() + math.prod(self.shape)
