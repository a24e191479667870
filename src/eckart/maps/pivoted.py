"""Low-rank storage without redundancy: k of the rows (or columns) of W, and the others as combinations of them.

Legend: W (m, n) of rank k; a row-pivoted W has y = gather([p; C p]) with p = B x, B (k, n) its pivot rows and
C (m - k, k); a column-pivoted W has y = B (x_pivots + C x_rest) with B (m, k) and C (k, n - k).

Source: Zhao et al. 2025, "Pivoting Factorization" (PIFA). Its pivots come from a QR of W; these come from a thin
factor and have near-maximal volume, so no entry of C exceeds 1.05.
"""

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.linalg import pivot_rows
from eckart.maps.base import LinearMap, linear_map, require, require_shape
from eckart.maps.lowrank import LowRank, lowrank_numbers
from eckart.maps.permutation import check_order, inverse_order

# From this many input vectors on, spelling out the identity rows of the second factor (m k numbers, written once per
# call) beats reordering every vector; and with gradients always, since the gradient of reordering is slower still
# (benchmarks/constants.py for the former, docs/LOG.md for the latter).
EXPAND_TOKENS = 256
# Reordering one number of one vector takes as long as this many multiplications and additions.
GATHER_COST = 100


@linear_map
class Pivoted(LinearMap):
    """A map of rank k in k (m + n - k) numbers and one permutation: never more than m n.

    Attributes:
        basis: (k, n) pivot rows of W, or (m, k) its pivot columns.
        coefficients: (m - k, k), or (k, n - k): the other rows or columns in terms of the pivots.
        order: (m,) or (n,) int32. Rows: y_i is entry order[i] of [pivot outputs; other outputs]. Columns: entries
            x[order] are [pivot inputs; other inputs].
        axis: "rows" or "columns", which of the two are the pivots.
    """

    basis: Tensor
    coefficients: Tensor
    order: Tensor
    axis: str

    def __post_init__(self) -> None:
        require(self.axis in ("rows", "columns"), "Pivoted", f"axis {self.axis!r}", "'rows' or 'columns'")
        came = f"basis {tuple(self.basis.shape)} and order {tuple(self.order.shape)}"
        require(self.basis.ndim == 2 and self.order.ndim == 1, "Pivoted", came, "a matrix and a vector")
        tall, k = self.order.shape[0], self.rank
        other = (tall - k, k) if self.axis == "rows" else (k, tall - k)
        require(self.order.dtype == torch.int32, "Pivoted order", f"dtype {self.order.dtype}", "int32")
        require(k <= tall, "Pivoted", f"{k} pivots of {tall} {self.axis}", "at most all of them")
        require_shape("Pivoted coefficients", self.coefficients, *other)

    @property
    def shape(self) -> tuple[int, int]:
        if self.axis == "rows":
            return self.order.shape[0], self.basis.shape[1]
        return self.basis.shape[0], self.order.shape[0]

    @property
    def rank(self) -> int:
        """The number of pivots k."""
        return self.basis.shape[0] if self.axis == "rows" else self.basis.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        if expands(self.rank, self.order.shape[0], x.numel() // max(x.shape[-1], 1), self._learns(x)):
            return self.lowrank()(x)
        return multiply_pivoted(x, self.basis, self.coefficients, self.order, self.axis)

    def _learns(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.basis.requires_grad)

    def validate(self) -> None:
        """Raise an `EckartError` unless the order is one."""
        check_order("Pivoted", self.order)

    @property
    def T(self) -> LinearMap:
        axis = "columns" if self.axis == "rows" else "rows"
        order = inverse_order(self.order)
        return Pivoted(self.basis.mT, self.coefficients.mT, order, axis)

    def dense(self) -> Tensor:
        return self.lowrank().dense()

    def flops(self, tokens: int = 1) -> int:
        k = self.rank
        if expands(k, self.order.shape[0], tokens):
            return 2 * tokens * lowrank_numbers(self.shape, k)
        joined = tokens * k if self.axis == "columns" else 0
        return 2 * tokens * pivoted_numbers(self.shape, k) + joined

    def dense_flops(self) -> int:
        return 2 * self.rank * math.prod(self.shape)

    def lowrank(self) -> LowRank:
        """Return the same map as two factors, k (m + n) numbers."""
        basis, order = self.basis, self.order
        if self.axis == "columns":
            return cast(LowRank, cast(Pivoted, self.T).lowrank().T)
        unit = torch.eye(self.rank, dtype=self.coefficients.dtype, device=self.coefficients.device)
        return LowRank(torch.cat((unit, self.coefficients)).index_select(0, order), basis)


def multiply_pivoted(x: Tensor, basis: Tensor, coefficients: Tensor, order: Tensor, axis: str) -> Tensor:
    """Return W x from the parts of a `Pivoted`, with its numbers and no more: x (..., n) -> (..., m)."""
    if axis == "rows":
        pivots = F.linear(x, basis)
        return torch.cat((pivots, F.linear(pivots, coefficients)), dim=-1).index_select(-1, order)
    k, ordered = basis.shape[1], x.index_select(-1, order)
    return F.linear(ordered[..., :k] + F.linear(ordered[..., k:], coefficients), basis)


def expands(rank: int, length: int, vectors: int, gradients: bool = False) -> bool:
    """Tell whether multiplying by the k^2 numbers that are not stored costs less than reordering every vector.

    Args:
        rank: k.
        length: of the vectors that would be reordered.
        vectors: how many there are.
        gradients: whether they are to be differentiated as well.
    """
    return gradients or (vectors >= EXPAND_TOKENS and rank**2 <= GATHER_COST * length)


def pivoted_numbers(shape: tuple[int, int], rank: int) -> int:
    """Return the numbers a `Pivoted` of that shape and rank stores: k (m + n - k)."""
    return rank * (shape[0] + shape[1] - rank)


def random_pivoted(
    shape: tuple[int, int], rank: int, device: torch.device | None = None, axis: str | None = None
) -> Pivoted:
    """Return a `Pivoted` of a shape and rank with random numbers, for what depends on sizes alone.

    Args:
        shape: (m, n).
        rank: k.
        device: where it is made.
        axis: "rows", "columns", or None for the shorter side, as `pivot` chooses.
    """
    m, n = shape
    if (axis or ("rows" if m <= n else "columns")) == "columns":
        return cast(Pivoted, random_pivoted((n, m), rank, device, "rows").T)
    order = torch.arange(m, dtype=torch.int32, device=device)
    basis, coefficients = torch.randn(rank, n, device=device), torch.randn(m - rank, rank, device=device)
    return Pivoted(basis, coefficients, order, "rows")


def pivot(map_: LowRank, axis: str | None = None) -> Pivoted:
    """Store a low-rank map by pivots: the same matrix up to rounding, k^2 fewer numbers.

    Args:
        map_: up (m, k) and down (k, n), both of rank k; computed in float64.
        axis: "rows", "columns", or None for the shorter side, whose gather costs less.

    Raises:
        EckartError: if the rank exceeds a side, or a factor is rank-deficient.
    """
    m, n = map_.shape
    k = map_.rank
    require(k <= min(m, n), "pivot", f"rank {k} of a {m} x {n} map", "at most the shorter side")
    if axis is None:
        axis = "rows" if m <= n else "columns"
    if axis == "columns":
        rows = pivot(cast(LowRank, map_.T), "rows")
        order = inverse_order(rows.order)
        return Pivoted(rows.basis.mT.contiguous(), rows.coefficients.mT.contiguous(), order, "columns")
    up, down = map_.up.double(), map_.down.double()
    try:
        found = pivot_rows(up)
    except torch.linalg.LinAlgError as error:
        raise EckartError(f"pivot: the up factor {m} x {k} has a rank below {k}; truncate the map first") from error
    order = torch.empty(m, dtype=torch.int32, device=up.device)
    order[torch.cat((found.rows, found.rest))] = torch.arange(m, dtype=torch.int32, device=up.device)
    dtype = map_.dtype
    return Pivoted((up[found.rows] @ down).to(dtype), found.coefficients.to(dtype), order, "rows")
