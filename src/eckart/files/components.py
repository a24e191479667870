"""Components of low-rank maps as codes: how an elastic folder stores them, and the map of the first of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from eckart.maps import LinearMap, Product, Quantized

# The tensors of a matrix of codes.
PARTS = "codes", "scale", "zero", "levels"


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """How the numbers of a folder of codes are stored.

    Attributes:
        bits: per code.
        group_size: codes of a row that share a scale.
        zeros: whether groups have zero points.
        levels: whether rows have tables of levels.
    """

    bits: int
    group_size: int
    zeros: bool
    levels: bool

    @property
    def parts(self) -> list[str]:
        """The names of the tensors that a matrix of codes consists of."""
        return [part for part in PARTS if self.zeros or part != "zero" if self.levels or part != "levels"]

    def nbytes(self, rows: int, width: int, itemsize: int) -> int:
        """Return the bytes of a matrix of codes whose other numbers take `itemsize` bytes each."""
        groups = -(-width // self.group_size) * (1 + self.zeros)
        return rows * (-(-width * self.bits // 8) + (groups + self.levels * (1 << self.bits)) * itemsize)

    def matrix(self, tensors: Mapping[str, Tensor], width: int) -> Quantized:
        """Return the matrix of codes, with rows of a width, that tensors by part hold."""
        codes, scale, zero, levels = tensors["codes"], tensors["scale"], tensors.get("zero"), tensors.get("levels")
        return Quantized(codes, scale, zero, levels, width, self.bits, self.group_size)

    def tensors(self, prefix: str, map_: Quantized) -> dict[str, Tensor]:
        """Return the tensors that hold a matrix of codes, by name."""
        return {f"{prefix}.{part}": getattr(map_, part) for part in self.parts}


def coded_map(ups: Quantized, downs: Quantized, rank: int, *, table: bool) -> LinearMap:
    """Return the map of the first components, which are codes; nothing is decoded.

    Args:
        ups: a row of codes per component, (k, m); of an embedding a row per token, (m, k).
        downs: a row of codes per component, (k, n).
        rank: how many components.
        table: whether it is an embedding.
    """
    first = ups.leading(ups.shape[0], rank) if table else ups.leading(rank, ups.width).T
    return Product((first, downs.leading(rank, downs.width)))
