"""Tensor trains: a matrix of many rows and columns as a chain of small cores."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from eckart.maps.base import LinearMap, linear_map, require
from eckart.maps.lowrank import LowRank
from eckart.maps.recomputed import multiply_by_rows

# An operation in the chain of small products takes as long as about this many in one large product, with gradients, on
# CPU: chains of a third of the operations took 1.8 times as long, chains of a ninth two thirds.
EFFORT = 8


@linear_map
class TensorTrain(LinearMap):
    """W_ij = G_1[:, i_1, j_1, :] ... G_d[:, i_d, j_d, :] for rows i = (i_1, ..., i_d) and columns j = (j_1, ..., j_d).

    Core k has shape (r_(k-1), m_k, n_k, r_k), r_0 = r_d = 1. With every n_k = 1 up to some k and every m_k = 1 after it
    the train runs through the rows first and then the columns: a matrix product state, whose case of two cores is low
    rank. Applied core by core, the last one first, unless that takes longer than writing W
    out.

    Attributes:
        entries: all cores, one after the other, flattened.
        heights: m_1, ..., m_d.
        widths: n_1, ..., n_d.
        ranks: r_0, ..., r_d.

    Source: Oseledets 2011, "Tensor-train decomposition", section 4.3 for matrices.
    """

    entries: Tensor
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        d = len(self.heights)
        fits = d > 0 and len(self.widths) == d and len(self.ranks) == d + 1 and self.ranks[0] == self.ranks[-1] == 1
        came = f"heights {self.heights}, widths {self.widths} and ranks {self.ranks}"
        require(fits and min(*self.heights, *self.widths, *self.ranks) > 0, "TensorTrain", came, "one chain of cores")
        count = sum(math.prod(shape) for shape in self.core_shapes())
        fits = tuple(self.entries.shape) == (count,)
        require(fits, "TensorTrain", f"numbers of shape {tuple(self.entries.shape)}", f"({count},) for {came}")

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.heights), math.prod(self.widths)

    def core_shapes(self) -> list[tuple[int, int, int, int]]:
        """Return the shape of every core."""
        sides = zip(pairwise(self.ranks), self.heights, self.widths, strict=True)
        return [(before, m, n, after) for (before, after), m, n in sides]

    def cores(self) -> list[Tensor]:
        """Return the cores, as views."""
        shapes = self.core_shapes()
        pieces = self.entries.split([math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        vectors, left, done = math.prod(x.shape[:-1]), self.shape[1], 1
        if self._is_written(vectors):
            return multiply_by_rows(x, self._rows, (self.entries,), self.shape[0], step=self.shape[0])
        y = x
        for core in reversed(self.cores()):
            before, m, n, after = core.shape
            left //= n
            # (columns to the left, n, rows done, r_k) -> (columns to the left, rows done, n r_k)
            inner = y.reshape(vectors * left, n, done, after).transpose(1, 2).reshape(-1, n * after)
            outer = inner @ core.permute(2, 3, 1, 0).reshape(n * after, m * before)
            y = outer.reshape(vectors * left, done, m, before).transpose(1, 2)
            done *= m
        return y.reshape(*x.shape[:-1], done)

    def _rows(self, start: int, stop: int, entries: Sequence[Tensor]) -> Tensor:
        return TensorTrain(entries[0], self.heights, self.widths, self.ranks).dense()[start:stop]

    def lowrank(self) -> LowRank | None:
        """Return a train that runs through all rows first and then through all columns as two thin matrices."""
        bond = next((k for k, n in enumerate(self.widths) if n > 1), len(self.widths))
        if max(self.heights[bond:], default=1) > 1:
            return None
        up, down = self.entries.new_ones(1, 1), self.entries.new_ones(1, 1)
        cores = self.cores()
        for core in cores[:bond]:
            up = (up @ core.flatten(1)).reshape(-1, core.shape[3])
        for core in reversed(cores[bond:]):
            down = (core.flatten(0, 2) @ down).reshape(core.shape[0], -1)
        return LowRank(up, down)

    @property
    def T(self) -> LinearMap:
        turned = torch.cat([core.transpose(1, 2).flatten() for core in self.cores()])
        return TensorTrain(turned, self.widths, self.heights, self.ranks)

    def dense(self) -> Tensor:
        cores = self.cores()
        rows, columns, out = 1, 1, cores[0].new_ones(1, 1)
        for core in cores:
            before, m, n, after = core.shape
            grown = out.reshape(rows * columns, before) @ core.reshape(before, m * n * after)
            out = grown.reshape(rows, columns, m, n, after).transpose(1, 2)
            rows, columns = rows * m, columns * n
        return out.reshape(rows, columns).contiguous()

    def flops(self, tokens: int = 1) -> int:
        if self._is_written(tokens):
            return self.dense_flops() + 2 * tokens * math.prod(self.shape)
        return self._chain_flops(tokens)

    def _is_written(self, tokens: int) -> bool:
        """Tell whether writing W out takes less time than the chain of small products and the states it keeps."""
        return EFFORT * self._chain_flops(tokens) > self.dense_flops() + 2 * tokens * math.prod(self.shape)

    def _chain_flops(self, tokens: int) -> int:
        total, left, done = 0, self.shape[1], 1
        for before, m, n, after in reversed(self.core_shapes()):
            left //= n
            total += 2 * tokens * left * done * n * after * m * before
            done *= m
        return total

    def dense_flops(self) -> int:
        total, written = 0, 1
        for before, m, n, after in self.core_shapes():
            total += 2 * written * before * m * n * after
            written *= m * n
        return total


def tensor_train(cores: Sequence[Tensor]) -> TensorTrain:
    """Return the tensor train of cores (r_(k-1), m_k, n_k, r_k)."""
    ranks = (1, *(core.shape[3] for core in cores))
    heights, widths = (tuple(core.shape[axis] for core in cores) for axis in (1, 2))
    return TensorTrain(torch.cat([core.flatten() for core in cores]), heights, widths, ranks)


def factored(size: int, count: int) -> tuple[int, ...]:
    """Return `count` whole numbers whose product is `size`: each the largest divisor not above the root of the rest."""
    out = []
    for rest in range(count, 0, -1):
        divisor = 1
        for d in range(1, size + 1):
            if d**rest > size:
                break
            if size % d == 0:
                divisor = d
        out.append(divisor)
        size //= divisor
    return tuple(out)
