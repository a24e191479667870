"""Tucker decompositions: a matrix whose rows and columns are numbered by several indices, as a core between factors."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maps.base import LinearMap, linear_map, require


@linear_map
class Tucker(LinearMap):
    """W_ij = sum_pq G_pq U^1_(i_1 p_1) U^2_(i_2 p_2) ... V^1_(j_1 q_1) V^2_(j_2 q_2) ...

    for rows i = (i_1, i_2, ...) and columns j = (j_1, j_2, ...): the kernel of a convolution has one index of rows, the
    output channel, and as many of columns as it has further axes. Applied factor by factor.

    Attributes:
        entries: G, the U^k, then the V^k, one after the other, flattened.
        heights: m_1, m_2, ..., whose product is the number of rows.
        widths: n_1, n_2, ..., whose product is the number of columns.
        ranks: sizes of the axes of G, first of rows, then of columns.

    Source: Tucker 1966, "Some mathematical notes on three-mode factor analysis".
    """

    entries: Tensor
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (*self.heights, *self.widths)
        came = f"heights {self.heights}, widths {self.widths} and ranks {self.ranks}"
        fits = len(self.heights) > 0 and len(self.widths) > 0 and len(self.ranks) == len(sizes)
        require(fits and min(*sizes, *self.ranks) > 0, "Tucker", came, "a rank for every size, all positive")
        count = tucker_numbers(sizes, self.ranks)
        fits = tuple(self.entries.shape) == (count,)
        require(fits, "Tucker", f"numbers of shape {tuple(self.entries.shape)}", f"({count},) for {came}")

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.heights), math.prod(self.widths)

    def parts(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return G, the U^k (m_k, p_k) and the V^k (n_k, q_k), as views."""
        shapes = list(zip((*self.heights, *self.widths), self.ranks, strict=True))
        core, *factors = self.entries.split([math.prod(self.ranks), *(size * rank for size, rank in shapes)])
        matrices = [factor.view(shape) for factor, shape in zip(factors, shapes, strict=True)]
        return core.view(self.ranks), matrices[: len(self.heights)], matrices[len(self.heights) :]

    def __call__(self, x: Tensor) -> Tensor:
        core, outs, ins = self.parts()
        y = x.reshape(-1, *self.widths)
        for factor in ins:  # each takes its axis from the front and puts it behind all others
            y = y.movedim(1, -1) @ factor
        y = F.linear(y.flatten(1), core.reshape(math.prod(self.ranks[: len(outs)]), -1))
        y = y.view(-1, *self.ranks[: len(outs)])
        for factor in outs:
            y = y.movedim(1, -1) @ factor.mT
        return y.reshape(*x.shape[:-1], self.shape[0])

    @property
    def T(self) -> LinearMap:
        core, outs, ins = self.parts()
        axes = [*range(len(outs), core.ndim), *range(len(outs))]
        entries = torch.cat([part.flatten() for part in (core.permute(axes), *ins, *outs)])
        return Tucker(entries, self.widths, self.heights, tuple(self.ranks[axis] for axis in axes))

    def dense(self) -> Tensor:
        return self(torch.eye(self.shape[1], dtype=self.dtype, device=self.device)).mT.contiguous()

    def flops(self, tokens: int = 1) -> int:
        count = len(self.heights)
        rows, columns = self.ranks[:count], self.ranks[count:]
        total, held = 2 * math.prod(self.ranks), self.shape[1]
        for n, rank in zip(self.widths, columns, strict=True):
            total += 2 * held * rank
            held = held // n * rank
        held = math.prod(rows)
        for m, rank in zip(self.heights, rows, strict=True):
            total += 2 * held * m
            held = held // rank * m
        return tokens * total

    def dense_flops(self) -> int:
        return self.flops(self.shape[1])


def tucker_numbers(sizes: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Return the numbers a Tucker decomposition stores: prod r_k + sum d_k r_k."""
    return math.prod(ranks) + sum(size * rank for size, rank in zip(sizes, ranks, strict=True))
