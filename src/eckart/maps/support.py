"""Products with sparse matrices whose values train: no dense matrix is kept, nor a dense gradient.

    y = x W^T        dL/dx = dy W        dL/dw_k = sum_t dy_t,i(k) x_t,j(k)   for the k-th place (i, j)

On CPU below a density of 1/8 all three are products of compressed rows, the last one sampled at the places. Elsewhere W
is written out twice, for one product each, and freed. Sparse matrices added to a dense one are written into a copy of
some of its rows at a time, so that one dense product serves all of them in forward and one in backward.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maps.recomputed import ENTRIES, multiply_blocks

# Sampling products by compressed rows takes less time than dense ones below a density of about this, on CPU.
SAMPLED = 1 / 8
# A factor, values, columns and starts.
Term = tuple[float, Tensor, Tensor, Tensor]
# Derivatives by x and by the values.
Two = tuple[Tensor | None, Tensor | None]


def multiply_trained(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """Return W x for a sparse W whose values may train: x (..., n) -> (..., m).

    Args:
        x: inputs, of the dtype of the values.
        values: (nonzeros,), row by row.
        columns: column of each, (nonzeros,) int32.
        starts: where each row starts, (m + 1,) int32.
    """
    apply = cast(Callable[..., Tensor], _OnSupport.apply)
    return apply(x, values, columns, starts)


def multiply_sum(x: Tensor, weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """Return (W + s_1 P_1 + s_2 P_2 + ...) x for sparse P whose values may train: x (..., n) -> (..., m).

    Args:
        x: inputs.
        weight: W (m, n), frozen, of the dtype of x.
        terms: s, values, columns and starts of every P.
    """
    apply = cast(Callable[..., Tensor], _Sum.apply)
    scales, tensors = [term[0] for term in terms], [t for term in terms for t in term[1:]]
    return apply(x, weight, scales, *tensors)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Sequence[float], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *tensors)
        ctx.scales = scales
        return multiply_blocks(x, _blocks(weight, scales, tensors), weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        flat, gradient = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, gradients[0].shape[-1])
        of_x: Tensor | None = None
        for span, block in _blocks(weight, ctx.scales, tensors) if ctx.needs_input_grad[0] else ():
            part = gradient[:, span] @ block
            of_x = part if of_x is None else of_x + part
        found: list[Tensor | None] = [None] * len(tensors)
        for i, scale in enumerate(ctx.scales):
            values, *places = tensors[3 * i : 3 * i + 3]
            if ctx.needs_input_grad[3 + 3 * i]:
                derivatives = _sampled if _is_sampled(x, values, weight.numel()) else _whole
                of_values = cast(Tensor, derivatives(flat, gradient, (values, *places), (False, True))[1])
                found[3 * i] = (scale * of_values).to(values.dtype)
        return None if of_x is None else of_x.view(x.shape), None, None, *found


def _blocks(weight: Tensor, scales: Sequence[float], tensors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of W + s_1 P_1 + ... and which they are."""
    m, n = weight.shape
    step = max(1, ENTRIES // max(n, 1))
    for start in range(0, m, step):
        stop, flat = min(start + step, m), weight[start : start + step].flatten()
        for i, scale in enumerate(scales):
            values, columns, starts = tensors[3 * i : 3 * i + 3]
            if step < m:
                first, last = int(starts[start]), int(starts[stop])
                values, columns, starts = values[first:last], columns[first:last], starts[start : stop + 1] - first
            flat = flat.index_add(0, _places(columns, starts, n), values.to(flat.dtype), alpha=scale)
        yield slice(start, stop), flat.view(stop - start, n)


def _is_sampled(x: Tensor, values: Tensor, entries: int) -> bool:
    """Tell whether products with so many of the entries of a matrix are best sampled, and not differentiated again."""
    known = x.is_cpu and x.dtype in (torch.float32, torch.float64) and x.dtype == values.dtype
    return known and values.numel() <= SAMPLED * entries and not torch.is_grad_enabled()


class _OnSupport(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
        m, n = starts.shape[0] - 1, x.shape[-1]
        ctx.save_for_backward(x, values, columns, starts)
        ctx.sampled = x.is_cpu and x.dtype in (torch.float32, torch.float64) and values.numel() <= SAMPLED * m * n
        with _without_autocast(x):
            if not ctx.sampled:
                return F.linear(x, _written(values, columns, starts, n))
            flat = x.reshape(-1, n)
            return (_compressed(values, columns, starts, n) @ flat.mT).mT.reshape(*x.shape[:-1], m)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *matrix = ctx.saved_tensors
        # products sampled at places have no derivatives of their own
        derivatives = _sampled if ctx.sampled and not torch.is_grad_enabled() else _whole
        flat, gradient = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, gradients[0].shape[-1])
        with _without_autocast(x):
            of_x, of_values = derivatives(flat, gradient, matrix, ctx.needs_input_grad)
        return None if of_x is None else of_x.reshape(x.shape), of_values, None, None


def _sampled(x: Tensor, gradient: Tensor, matrix: Sequence[Tensor], wanted: Sequence[bool]) -> Two:
    """Return the derivatives by x and by the values, by products of compressed rows."""
    values, columns, starts = matrix
    n, turned = x.shape[1], gradient.mT.contiguous()
    of_x = (_compressed(values, columns, starts, n).mT @ turned).mT if wanted[0] else None
    if not wanted[1]:
        return of_x, None
    places = _compressed(torch.zeros_like(values), columns, starts, n)
    return of_x, torch.sparse.sampled_addmm(places, turned, x.contiguous(), beta=0.0).values()


def _whole(x: Tensor, gradient: Tensor, matrix: Sequence[Tensor], wanted: Sequence[bool]) -> Two:
    """Return the derivatives by x and by the values, by dense products."""
    values, columns, starts = matrix
    n = x.shape[1]
    of_x = gradient @ _written(values, columns, starts, n) if wanted[0] else None
    return of_x, (gradient.mT @ x).flatten()[_places(columns, starts, n)] if wanted[1] else None


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context that computes in the dtype of x: sparse products know no half precision on CPU."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def row_of_each(starts: Tensor, count: int) -> Tensor:
    """Return the row of each of `count` non-zeros, int32, from where each row starts, (m + 1,) int32."""
    at = torch.arange(count, dtype=torch.int32, device=starts.device)
    return (torch.searchsorted(starts, at, right=True) - 1).to(torch.int32)


def _places(columns: Tensor, starts: Tensor, n: int) -> Tensor:
    first = torch.arange(0, n * (starts.shape[0] - 1), n, device=starts.device)
    return first.repeat_interleave(starts.diff(), output_size=columns.shape[0]) + columns


def _written(values: Tensor, columns: Tensor, starts: Tensor, n: int) -> Tensor:
    m = starts.shape[0] - 1
    return values.new_zeros(m * n).index_add(0, _places(columns, starts, n), values).view(m, n)


@functools.cache
def quiet() -> None:
    """Have torch's one warning of the process, that its sparse tensors are in beta, appear here and unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _compressed(values: Tensor, columns: Tensor, starts: Tensor, n: int) -> Tensor:
    quiet()
    shape = starts.shape[0] - 1, n
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
