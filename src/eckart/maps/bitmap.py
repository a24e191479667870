"""Equally many non-zeros in every row, their positions as one bit per entry: the smallest index above densities of 1/8.

A position costs n / s bits per non-zero; as a number it would cost 8 for n up to 256 and 16 beyond.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.linalg import largest_in_rows
from eckart.maps.base import LinearMap, linear_map, require, require_shape
from eckart.maps.sparse import by_compressed_rows, multiply_compressed_rows, sparse_of


@linear_map
class Bitmap(LinearMap):
    """A matrix with s non-zeros in every row.

    Attributes:
        values: (m, s), those of a row in the order of their columns.
        bits: (m, ceil(n / 8)) uint8; bit j % 8 of byte j // 8 tells whether column j has a value.
        width: n.
        nonzeros: s.
    """

    values: Tensor
    bits: Tensor
    width: int
    nonzeros: int

    def __post_init__(self) -> None:
        fits = 0 <= self.nonzeros <= self.width and self.bits.dtype == torch.uint8 and self.bits.ndim == 2
        came = f"{self.nonzeros} of {self.width} columns and bits {tuple(self.bits.shape)} of {self.bits.dtype}"
        require(fits, "Bitmap", came, "at most all columns and a matrix of uint8")
        require_shape("Bitmap bits", self.bits, self.bits.shape[0], -(-self.width // 8))
        require_shape("Bitmap values", self.values, self.bits.shape[0], self.nonzeros)

    @property
    def shape(self) -> tuple[int, int]:
        return self.bits.shape[0], self.width

    def __call__(self, x: Tensor) -> Tensor:
        if by_compressed_rows(x, self.values):
            return multiply_compressed_rows(x, self.values.flatten(), *compressed_rows(self.bits, self.width))
        return F.linear(x, self.dense())

    @property
    def T(self) -> LinearMap:
        columns, starts = compressed_rows(self.bits, self.width)
        rows = torch.repeat_interleave(torch.arange(self.shape[0], device=columns.device), starts.diff())
        by_column = torch.argsort(columns.long() * self.shape[0] + rows)
        values = self.values.flatten()
        return sparse_of(columns[by_column], rows[by_column], values[by_column], (self.width, self.shape[0]))

    def dense(self) -> Tensor:
        present = unpacked(self.bits, self.width)
        if self.nonzeros == 0:
            return self.values.new_zeros(self.shape)
        place = (present.to(torch.int32).cumsum(1) - 1).clamp(0, self.nonzeros - 1)
        return torch.where(present, self.values.gather(1, place), 0.0)

    def validate(self) -> None:
        """Raise an `EckartError` unless every row has as many bits set as values, none of them beyond the width."""
        whole = unpacked(self.bits, 8 * self.bits.shape[1])
        fits = bool((whole.sum(1) == self.nonzeros).all()) and not bool(whole[:, self.width :].any())
        require(fits, "Bitmap", "bits that do not match the values", f"{self.nonzeros} set in every row")

    def flops(self, tokens: int = 1) -> int:
        return 2 * tokens * self.values.numel()

    def dense_flops(self) -> int:
        return 0


@linear_map
class Scattered(LinearMap):
    """A matrix with s non-zeros in every row whose values are those of another map, such as one of codes.

    Attributes:
        values: V (m, s), the values of a row in the order of their columns.
        bits: (m, ceil(n / 8)) uint8, as of a `Bitmap`.
        width: n.
    """

    values: LinearMap
    bits: Tensor
    width: int

    def __post_init__(self) -> None:
        came = f"values {self.values.shape} and bits {tuple(self.bits.shape)} of {self.bits.dtype}"
        fits = self.values.shape[1] <= self.width and self.bits.dtype == torch.uint8
        require(fits, "Scattered", came, f"at most {self.width} values per row and uint8")
        require_shape("Scattered bits", self.bits, self.values.shape[0], -(-self.width // 8))

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.width

    def __call__(self, x: Tensor) -> Tensor:
        return self.bitmap()(x)

    @property
    def T(self) -> LinearMap:
        return self.bitmap().T

    def dense(self) -> Tensor:
        return self.bitmap().dense()

    def validate(self) -> None:
        """Raise an `EckartError` unless every row has as many bits set as values."""
        self.values.validate()
        self.bitmap().validate()

    def flops(self, tokens: int = 1) -> int:
        return 2 * tokens * math.prod(self.values.shape) + self.values.dense_flops()

    def dense_flops(self) -> int:
        return self.values.dense_flops()

    def bitmap(self) -> Bitmap:
        """Return the same matrix with its values written out."""
        return Bitmap(self.values.dense(), self.bits, self.width, self.values.shape[1])


def bitmap(matrix: Tensor, nonzeros: int) -> Bitmap:
    """Return a matrix restricted to the largest magnitudes of every row.

    Args:
        matrix: (m, n).
        nonzeros: s, how many are kept of each.

    Raises:
        EckartError: if s exceeds the row length.
    """
    m, n = matrix.shape
    require(0 <= nonzeros <= n, "bitmap", f"{nonzeros} of {n} entries per row", "at most all of them")
    present = largest_in_rows(matrix.abs(), nonzeros)
    values = matrix.new_empty(m, nonzeros) if matrix.is_meta else matrix[present].view(m, nonzeros)
    return Bitmap(values, packed(present), n, nonzeros)


def packed(present: Tensor) -> Tensor:
    """Return booleans (m, n) as bits (m, ceil(n / 8)) uint8, lowest bit first."""
    m, n = present.shape
    padded = F.pad(present.to(torch.uint8), (0, -n % 8)).view(m, -(-n // 8), 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=present.device)
    return (padded * weights).sum(2, dtype=torch.uint8)


def unpacked(bits: Tensor, width: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Return bits (m, bytes) uint8 as booleans (m, width), or as ones and zeros of another dtype."""
    each = torch.arange(256, device=bits.device)[:, None] >> torch.arange(8, device=bits.device) & 1
    table = each.to(dtype)  # what eight bits look like, for every byte there is
    rows = table.index_select(0, bits.flatten().int())
    return rows.view(*bits.shape[:-1], 8 * bits.shape[-1])[..., :width]


def compressed_rows(bits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return columns (nonzeros,) and starts (m + 1,), int32, of the entries whose bit is set."""
    present = unpacked(bits, width)
    starts = F.pad(present.sum(1).cumsum(0), (1, 0))
    return present.nonzero()[:, 1].to(torch.int32), starts.to(torch.int32)
