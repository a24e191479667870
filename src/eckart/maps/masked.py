"""A map multiplied entry by entry with a fixed mask."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maps.base import LinearMap, linear_map, require, require_shape
from eckart.maps.bitmap import packed, unpacked


@linear_map
class Masked(LinearMap):
    """W = mask * W_1, entry by entry; used where the kept entries are trained and the mask is not.

    The masked matrix is written out in every call: no product of factors survives an entrywise mask.

    Attributes:
        map: the map masked.
        mask: (m, n) bool, True where entries are kept; or the same as bits, (m, ceil(n / 8)) uint8, lowest first.
    """

    map: LinearMap
    mask: Tensor

    def __post_init__(self) -> None:
        m, n = self.map.shape
        bits = self.mask.dtype == torch.uint8
        require(
            bits or self.mask.dtype == torch.bool, "Masked mask", f"dtype {self.mask.dtype}", "bool, or uint8 of bits"
        )
        require_shape("Masked mask", self.mask, m, -(-n // 8) if bits else n)

    @property
    def shape(self) -> tuple[int, int]:
        return self.map.shape

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense())

    @property
    def T(self) -> LinearMap:
        present = self.present().mT
        return Masked(self.map.T, packed(present) if self.mask.dtype == torch.uint8 else present)

    def dense(self) -> Tensor:
        return self.map.dense() * self.present()

    def present(self) -> Tensor:
        """Return the mask as booleans, (m, n)."""
        return unpacked(self.mask, self.shape[1]) if self.mask.dtype == torch.uint8 else self.mask

    def flops(self, tokens: int = 1) -> int:
        return self.dense_flops() + 2 * tokens * math.prod(self.shape)

    def dense_flops(self) -> int:
        return self.map.dense_flops() + math.prod(self.shape)
