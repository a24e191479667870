"""Maps with few non-zero entries: unstructured (compressed rows) and N of every M along a row."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maps.base import LinearMap, linear_map, require, require_shape
from eckart.maps.recomputed import is_recorded
from eckart.maps.support import multiply_trained, quiet, row_of_each

# With more vectors than this, a half-full matrix is written out and multiplied densely (benchmarks/constants.py).
ROWS_TOKENS = 128


@linear_map
class Sparse(LinearMap):
    """Non-zeros stored row by row.

    Attributes:
        values: (nonzeros,), those of row i at starts[i] to starts[i + 1].
        columns: (nonzeros,) int32, the column of each.
        starts: (m + 1,) int32.
        width: n.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    width: int

    def __post_init__(self) -> None:
        require_shape("Sparse columns", self.columns, *self.values.shape)
        fits = self.starts.ndim == 1 and self.starts.shape[0] > 0 and self.values.ndim == 1
        require(fits, "Sparse", f"starts of shape {tuple(self.starts.shape)}", "(rows + 1,)")

    @property
    def shape(self) -> tuple[int, int]:
        return self.starts.shape[0] - 1, self.width

    def __call__(self, x: Tensor) -> Tensor:
        if by_compressed_rows(x, self.values):
            return multiply_compressed_rows(x, self.values, self.columns, self.starts)
        if x.dtype == self.values.dtype and x.shape[-1] > 0 and is_recorded(x, self.values):
            return multiply_trained(x, self.values, self.columns, self.starts)
        return F.linear(x, self.dense())

    def validate(self) -> None:
        """Raise an `EckartError` unless the indices are those of a matrix; wrong ones would read foreign memory."""
        count, starts = self.values.shape[0], self.starts
        ordered = int(starts[0]) == 0 and int(starts[-1]) == count and bool((starts[1:] >= starts[:-1]).all())
        require(ordered, "Sparse", "starts that do not ascend", f"0 to {count}, ascending")
        inside = count == 0 or (int(self.columns.min()) >= 0 and int(self.columns.max()) < self.width)
        require(inside, "Sparse", "columns beyond the matrix", f"0 to {self.width - 1}")

    @property
    def T(self) -> LinearMap:
        by_column = torch.argsort(self.columns.long() * self.shape[0] + self.rows())
        return sparse_of(self.columns[by_column], self.rows()[by_column], self.values[by_column], self.shape[::-1])

    def dense(self) -> Tensor:
        m, n = self.shape
        flat = self.rows().long() * n + self.columns.long()
        return self.values.new_zeros(m * n).index_add(0, flat, self.values).view(m, n)

    def flops(self, tokens: int = 1) -> int:
        return 2 * tokens * self.values.numel()

    def dense_flops(self) -> int:
        return self.values.numel()

    def rows(self) -> Tensor:
        """Return the row of each non-zero, (nonzeros,) int32."""
        return row_of_each(self.starts, self.values.shape[0])


def by_compressed_rows(x: Tensor, values: Tensor) -> bool:
    """Tell whether torch multiplies such a sparse matrix by such vectors: on CPU in float32 or float64, outside of
    autocast, compiled code and functional transforms; and whether that suffices, since it knows no gradient of the
    values.
    """
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == values.dtype
        and x.shape[-1] > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (x.requires_grad or values.requires_grad))
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(values)
    )


def multiply_compressed_rows(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """Return W x for a sparse W in compressed rows: x (..., n) -> (..., m), by torch's sparse product.

    On CPU it takes a fifth to two thirds of the time of writing W out, at a density of 0.1 (benchmarks/constants.py).
    """
    quiet()
    m, flat = starts.shape[0] - 1, x.reshape(-1, x.shape[-1])
    matrix = torch.sparse_csr_tensor(starts, columns, values, (m, flat.shape[1]), check_invariants=False)
    product: Tensor = (matrix @ flat.mT).mT
    return product.reshape(*x.shape[:-1], m)


def sparse_of(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Sparse:
    """Return a `Sparse` map of non-zeros given row by row: their rows, columns and values, (nonzeros,) each."""
    counts = torch.zeros(shape[0] + 1, dtype=torch.int32, device=values.device)
    counts = counts.index_add(0, rows.long() + 1, torch.ones_like(rows, dtype=torch.int32))
    return Sparse(values, columns.to(torch.int32), counts.cumsum(0).to(torch.int32), shape[1])


def sparse(matrix: Tensor) -> Sparse:
    """Return the non-zero entries of a matrix as a `Sparse` map."""
    rows, columns = matrix.nonzero(as_tuple=True)
    return sparse_of(rows, columns, matrix[rows, columns], (matrix.shape[0], matrix.shape[1]))


@linear_map
class NM(LinearMap):
    """N non-zeros in every M consecutive entries of a row, as the sparse units of GPUs want (2:4).

    Attributes:
        values: (m, groups, N).
        places: (m, groups, N), the position of each value within its group, below M; uint8.
        period: M; n = groups M.
    """

    values: Tensor
    places: Tensor
    period: int

    def __post_init__(self) -> None:
        require_shape("NM places", self.places, *self.values.shape)
        fits = self.values.ndim == 3 and self.places.dtype == torch.uint8 and self.values.shape[2] <= self.period
        came = f"values {tuple(self.values.shape)}, places {self.places.dtype}, period {self.period}"
        require(fits, "NM", came, "(rows, groups, N), uint8, and N at most the period")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1] * self.period

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() // max(self.shape[1], 1) <= ROWS_TOKENS and by_compressed_rows(x, self.values):
            columns = self.columns().to(torch.int32)
            starts = torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=torch.int32)
            return multiply_compressed_rows(x, self.values.flatten(), columns.flatten(), starts)
        return F.linear(x, self.dense())

    def validate(self) -> None:
        """Raise an `EckartError` unless every place lies within its group."""
        inside = self.places.numel() == 0 or int(self.places.max()) < self.period
        require(inside, "NM", "places beyond their group", f"0 to {self.period - 1}")

    @property
    def T(self) -> LinearMap:
        m, n = self.shape
        columns, values = self.columns(), self.values.flatten(1)
        rows = torch.arange(m, device=values.device)[:, None].expand_as(columns)
        by_column = torch.argsort((columns * m + rows).flatten())
        return sparse_of(columns.flatten()[by_column], rows.flatten()[by_column], values.flatten()[by_column], (n, m))

    def dense(self) -> Tensor:
        out = self.values.new_zeros(*self.values.shape[:2], self.period)
        filled: Tensor = out.scatter_add(2, self.places.long(), self.values)
        return filled.flatten(1)

    def flops(self, tokens: int = 1) -> int:
        if tokens > ROWS_TOKENS:
            return 2 * tokens * math.prod(self.shape) + self.dense_flops()
        return 2 * tokens * self.values.numel()

    def dense_flops(self) -> int:
        return self.values.numel()

    def columns(self) -> Tensor:
        """Return the column of each value, (m, groups * N) int64."""
        groups = torch.arange(self.values.shape[1], device=self.values.device)[:, None]
        return (self.places.long() + groups * self.period).flatten(1)


def n_of_m(matrix: Tensor, keep: int, period: int) -> NM:
    """Return a matrix restricted to the `keep` largest magnitudes of every `period` consecutive entries of a row.

    Raises:
        EckartError: if the period does not divide the row length, or `keep` exceeds it.
    """
    m, n = matrix.shape
    require(n % period == 0, "n_of_m", f"rows of length {n}", f"a multiple of the period {period}")
    require(0 < keep <= period <= 256, "n_of_m", f"{keep} of {period}", "0 < N <= M <= 256")
    groups = matrix.view(m, n // period, period)
    places = groups.abs().topk(keep, dim=2).indices.sort(dim=2).values
    return NM(groups.gather(2, places), places.to(torch.uint8), period)
