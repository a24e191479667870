"""Products with matrices that are written out a block of rows at a time, in forward and again in backward.

    y = x D^T,   dL/dx = dy D,   dL/dD = dy^T x, which is passed on to what D is made of, block by block

Legend: D (m, n), x (t, n), y (t, m).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

# Entries of D that are written out at once.
ENTRIES = 1 << 20
# (first row, row behind the last, what D is made of) -> those rows of D
Rows = Callable[[int, int, Sequence[Tensor]], Tensor]


def is_recorded(x: Tensor, *tensors: Tensor) -> bool:
    """Tell whether autograd records a product of these, outside of compiled code and of functional transforms."""
    every = (x, *tensors)
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in every)
        and not torch.compiler.is_compiling()
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in every)
    )


def multiply_by_rows(x: Tensor, rows: Rows, tensors: Sequence[Tensor], m: int, *, step: int | None = None) -> Tensor:
    """Return x D^T for a matrix D that is written out a block of rows at a time: x (..., n) -> (..., m).

    It is written out again in backward, and never kept.

    Args:
        x: inputs.
        rows: returns rows of D from the tensors; what it does to them is differentiated as autograd does.
        tensors: what D is made of, the only things that may train in `rows`.
        m: number of rows of D.
        step: rows of a block; by default about a million entries.
    """
    step = step or max(1, ENTRIES // max(x.shape[-1], 1))
    if not is_recorded(x, *tensors):
        parts = [F.linear(x, rows(*span, tensors).to(x.dtype)) for span in _spans(m, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    apply = cast(Callable[..., Tensor], _ByRows.apply)
    return apply(x, rows, m, step, *tensors)


def _spans(m: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, m)) for start in range(0, m, step)]


def multiply_blocks(x: Tensor, blocks: Iterable[tuple[slice, Tensor]], m: int) -> Tensor:
    """Return x D^T from blocks of rows of D (m, n) and which rows they are, each product written where it belongs.

    What is returned is no view, so that it may be written over behind an autograd function; without gradients.
    """
    y, inputs = x.new_empty(*x.shape[:-1], m), x.reshape(-1, x.shape[-1])
    flat = y.view(-1, m)
    for span, block in blocks:
        if torch.is_autocast_enabled(x.device.type):
            flat[:, span] = F.linear(inputs, block.to(x.dtype))
        else:
            torch.mm(inputs, block.to(x.dtype).mT, out=flat[:, span])
    return y


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, m: int, step: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.rows, ctx.m, ctx.spans = rows, m, _spans(m, step)
        written = ((slice(start, stop), rows(start, stop, tensors)) for start, stop in ctx.spans)
        return multiply_blocks(x, written, m)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # derivatives of this derivative are wanted
        x, *tensors = ctx.saved_tensors
        flat, gradient = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, ctx.m)
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[4:]) if needs]
        if not again:
            tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        of_x: Tensor | None = None
        of_tensors: list[Tensor | None] = [None] * len(tensors)
        for start, stop in ctx.spans:
            part = gradient[:, start:stop]
            with torch.enable_grad():
                block = ctx.rows(start, stop, tensors)
            if ctx.needs_input_grad[0]:
                written = block.to(x.dtype) if again else block.detach().to(x.dtype)
                if of_x is None:
                    of_x = part @ written
                else:
                    of_x = of_x + part @ written if again else of_x.addmm_(part, written)
            if wanted:
                of_block = (part.mT @ flat).to(block.dtype)
                leaves = [tensors[i] for i in wanted]
                found = torch.autograd.grad(block, leaves, of_block, create_graph=again, materialize_grads=True)
                for i, g in zip(wanted, found, strict=True):
                    so_far = of_tensors[i]
                    of_tensors[i] = g if so_far is None else so_far + g
        return (None if of_x is None else of_x.reshape(x.shape), None, None, None, *of_tensors)
