"""Matrices of small whole-number codes, packed without gaps, with a scale per group: integers, or places in a table.

    W_ij = scale_ig l_i(c_ij) + zero_ig,   g = j // group_size,   l_i(c) = c - 2^(bits - 1), or levels_ic given a table

Bit number b of code j is bit (bits j + b) % 8 of byte (bits j + b) // 8 of its row, so that a row of n codes takes
ceil(bits n / 8) bytes.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maps.base import LinearMap, linear_map, require, require_shape
from eckart.maps.bitmap import packed, unpacked

BITS = (2, 3, 4, 5, 6, 8)


@linear_map
class Quantized(LinearMap):
    """A matrix of which every entry is a code of 2, 3, 4, 5, 6 or 8 bits.

    A code is a number of the model, however few its bits: `numbers` is the number of entries, as of a dense matrix.
    Scales, zero points and levels only say how codes are read; they are counted in `nbytes`. What follows is said of
    the matrix with axis "rows"; with "columns" the map is its adjoint.

    Attributes:
        codes: (m, ceil(bits n / 8)) uint8.
        scale: (m, ceil(n / group_size)), one per group of consecutive columns in a row.
        zero: what the middle code stands for, shaped like `scale`; None for 0.
        levels: (m, 2^bits), what the codes of a row stand for before scaling; None for c - 2^(bits - 1).
        width: n.
        bits: bits per code.
        group_size: columns per scale; the last group of a row may be shorter.
        axis: "rows" if groups run along the rows of W, "columns" if along its columns.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    levels: Tensor | None
    width: int
    bits: int
    group_size: int
    axis: str = "rows"

    def __post_init__(self) -> None:
        came = f"{self.bits} bits, groups of {self.group_size} and axis {self.axis!r}"
        fits = self.bits in BITS and self.group_size > 0 and self.axis in ("rows", "columns")
        require(fits, "Quantized", came, f"bits among {BITS}, a positive group size, and rows or columns")
        came = f"codes of shape {tuple(self.codes.shape)} and dtype {self.codes.dtype}"
        require(self.codes.ndim == 2 and self.codes.dtype == torch.uint8, "Quantized", came, "a matrix of uint8")
        rows, groups = self.codes.shape[0], -(-self.width // self.group_size)
        require_shape("Quantized codes", self.codes, rows, -(-self.width * self.bits // 8))
        require_shape("Quantized scale", self.scale, rows, groups)
        if self.zero is not None:
            require_shape("Quantized zero", self.zero, rows, groups)
        if self.levels is not None:
            require_shape("Quantized levels", self.levels, rows, 2**self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.codes.shape[0], self.width
        return (m, n) if self.axis == "rows" else (n, m)

    def __call__(self, x: Tensor) -> Tensor:
        entries = self._entries()
        return F.linear(x, entries) if self.axis == "rows" else x @ entries

    @property
    def T(self) -> LinearMap:
        return dataclasses.replace(self, axis="columns" if self.axis == "rows" else "rows")

    def dense(self) -> Tensor:
        entries = self._entries()
        return entries if self.axis == "rows" else entries.mT.contiguous()

    def counted(self) -> list[tuple[Tensor, int]]:
        return [(self.codes, self.codes.shape[0] * self.width)]

    def flops(self, tokens: int = 1) -> int:
        return 2 * tokens * self.codes.shape[0] * self.width + self.dense_flops()

    def dense_flops(self) -> int:
        return (1 if self.zero is None else 2) * self.codes.shape[0] * self.width

    def validate(self) -> None:
        """Raise an `EckartError` if bits behind the last code of a row are set: every matrix has one form."""
        spare = 8 * self.codes.shape[1] - self.bits * self.width
        clean = spare == 0 or self.codes.numel() == 0 or int(self.codes[:, -1].max()) < 2 ** (8 - spare)
        require(clean, "Quantized", "bits set behind the last code of a row", "zeros")

    def select(self, rows: Tensor) -> Tensor:
        """Return some rows of the matrix of codes: indices (...) int -> (..., n), dequantizing nothing else."""
        flat = rows.flatten()
        zero, levels = (None if t is None else t[flat] for t in (self.zero, self.levels))
        part = Quantized(self.codes[flat], self.scale[flat], zero, levels, self.width, self.bits, self.group_size)
        return part._entries().view(*rows.shape, self.width)

    def leading(self, rows: int, width: int) -> "Quantized":
        """Return the first rows and columns of the matrix of codes, which are as they were; nothing is decoded."""
        rows, width = min(rows, self.codes.shape[0]), min(width, self.width)
        codes, groups = self.codes[:rows, : -(-width * self.bits // 8)].clone(), -(-width // self.group_size)
        spare = 8 * codes.shape[1] - self.bits * width
        if spare:
            codes[:, -1] &= 2 ** (8 - spare) - 1
        scale = self.scale[:rows, :groups].contiguous()
        zero = None if self.zero is None else self.zero[:rows, :groups].contiguous()
        levels = None if self.levels is None else self.levels[:rows].contiguous()
        return dataclasses.replace(self, codes=codes, scale=scale, zero=zero, levels=levels, width=width)

    def _entries(self) -> Tensor:
        """Return the matrix of codes as numbers, (m, n)."""
        codes = unpack(self.codes, self.width, self.bits)
        if self.levels is None:
            values = (codes.to(torch.int16) - 2 ** (self.bits - 1)).to(self.scale.dtype)
        else:
            values = self.levels.gather(1, codes.long())
        entries: Tensor = values * self._spread(self.scale)
        return entries if self.zero is None else entries + self._spread(self.zero)

    def _spread(self, per_group: Tensor) -> Tensor:
        """Return a number per group (m, groups) as one per entry (m, n)."""
        return per_group.repeat_interleave(self.group_size, dim=1)[:, : self.width]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (m, n) below 2^bits as bytes (m, ceil(bits n / 8)) uint8."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    return packed(((codes.to(torch.uint8).unsqueeze(2) >> shifts) & 1).flatten(1))


def unpack(data: Tensor, width: int, bits: int) -> Tensor:
    """Return bytes (m, ceil(bits n / 8)) uint8 as codes (m, n) uint8."""
    if bits == 8:
        return data
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        whole: Tensor = ((data.unsqueeze(2) >> shifts) & (2**bits - 1)).flatten(1)
        return whole[:, :width]
    each = unpacked(data, width * bits).view(data.shape[0], width, bits).to(torch.uint8)
    weights = 2 ** torch.arange(bits, dtype=torch.uint8, device=data.device)
    codes: Tensor = (each * weights).sum(2, dtype=torch.uint8)
    return codes
