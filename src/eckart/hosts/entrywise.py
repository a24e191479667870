"""Changes that are computed entry by entry from a few trained numbers, such as masked products of factors.

    W' = W + s D(W)        y += s x D^T

No structure of the factors survives an entrywise mask or product, so D has to be written out. It is written a block of
rows at a time, once for the product and once more in backward, and never kept: autograd holds x and what D is made of.

Legend: W (m, n), D (m, n), x (t, n).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from eckart.hosts.adapter import Change, Inner, scaled
from eckart.maps import NM, Bitmap, Dense, LinearMap, LowRank, Quantized, Scaled, Sparse, Sum, unpacked

# Entries of D that are written out at once.
ENTRIES = 1 << 20
# (first row, row behind the last, what D is made of) -> those rows of D
Rows = Callable[[int, int, Sequence[Tensor]], Tensor]


class Entrywise(Change):
    """W + s D(W), D computed entry by entry.

    Attributes:
        scale: s.
        reads_weight: whether D depends on W.
    """

    reads_weight = False

    def __init__(self, shape: tuple[int, int], scale: float = 1.0) -> None:
        super().__init__()
        self.shape, self.scale = shape, scale

    @abstractmethod
    def made_of(self) -> tuple[Tensor, ...]:
        """Return the change's own tensors that D is made of."""

    def drawn(self) -> tuple[Tensor, ...]:
        """Return what D is made of in one step of training, where a method draws it at random."""
        return self.made_of()

    @abstractmethod
    def rows(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        """Return rows of D, (stop - start, n), from the change's own tensors and the same rows of W if it reads it."""

    def of(self, inner: LinearMap) -> LinearMap:
        weight = inner.dense() if self.reads_weight else None
        return Sum((inner, scaled(Dense(self.rows(0, self.shape[0], self.made_of(), weight)), self.scale)))

    def call(self, x: Tensor, inner: Inner) -> Tensor:
        y, own = inner.call(x), self.drawn() if self.training else self.made_of()
        leaves, tree = pytree.tree_flatten(inner.map()) if self.reads_weight else ([], None)

        def rows(start: int, stop: int, tensors: Sequence[Tensor]) -> Tensor:
            weight = None
            if tree is not None:
                weight = rows_of_map(pytree.tree_unflatten(list(tensors[len(own) :]), tree), start, stop)
            return self.rows(start, stop, tensors[: len(own)], weight)

        product = multiply_by_rows(x, rows, (*own, *leaves), self.shape[0])
        return y + (self.scale * product).to(y.dtype)


class MaskedFactors(Entrywise):
    """W + s mask * (U V): low rank where the mask has its ones.

    Args:
        up: U (m, r).
        down: V (r, n).
        bits: the mask as bits, (m, ceil(n / 8)) uint8.
        scale: s.
    """

    bits: Tensor

    def __init__(self, up: Tensor, down: Tensor, bits: Tensor, scale: float) -> None:
        super().__init__((up.shape[0], down.shape[1]), scale)
        self.up, self.down = torch.nn.Parameter(up), torch.nn.Parameter(down)
        self.register_buffer("bits", bits)

    def made_of(self) -> tuple[Tensor, ...]:
        return self.up, self.down, self.bits

    def rows(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        up, down, bits = own
        product: Tensor = up[start:stop] @ down
        return product * unpacked(bits[start:stop], self.shape[1])


def rows_of_map(map_: LinearMap, start: int, stop: int) -> Tensor:
    """Return some rows of the matrix of a map, (stop - start, n), without the others wherever that is possible."""
    match map_:
        case Dense(weight):
            return weight[start:stop]
        case LowRank(up, down):
            return up[start:stop] @ down
        case Scaled(inner, scale):
            return scale * rows_of_map(inner, start, stop)
        case Sum(maps):
            return torch.stack([rows_of_map(one, start, stop) for one in maps]).sum(0)
        case Sparse(values, columns, starts, width):
            first, last = int(starts[start]), int(starts[stop])
            return Sparse(values[first:last], columns[first:last], starts[start : stop + 1] - first, width).dense()
        case NM(values, places, period):
            return NM(values[start:stop], places[start:stop], period).dense()
        case Bitmap(values, bits, width, nonzeros):
            return Bitmap(values[start:stop], bits[start:stop], width, nonzeros).dense()
        case Quantized(axis="rows"):
            return map_.select(torch.arange(start, stop, device=map_.device))
        case _:
            return map_.dense()[start:stop]


def multiply_by_rows(x: Tensor, rows: Rows, tensors: Sequence[Tensor], m: int) -> Tensor:
    """Return x D^T for a matrix D that is written out a block of rows at a time: x (..., n) -> (..., m).

    Args:
        x: inputs.
        rows: returns rows of D from the tensors; what it does to them is differentiated as autograd does.
        tensors: what D is made of, the only things that may train in `rows`.
        m: number of rows of D.
    """
    if torch.compiler.is_compiling():  # which decides itself what is kept
        return F.linear(x, rows(0, m, tensors).to(x.dtype))
    apply = cast(Callable[..., Tensor], _ByRows.apply)
    return apply(x, rows, m, *tensors)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, m: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.rows, ctx.m = rows, m
        y = x.new_empty(*x.shape[:-1], m)
        for start, stop in _spans(m, x.shape[-1]):
            y[..., start:stop] = F.linear(x, rows(start, stop, tensors).to(x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # derivatives of this derivative are wanted
        x, *tensors = ctx.saved_tensors
        flat, gradient = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, ctx.m)
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
        if not again:
            tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        of_x = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        of_tensors: list[Tensor | None] = [None] * len(tensors)
        for start, stop in _spans(ctx.m, x.shape[-1]):
            part = gradient[:, start:stop]
            with torch.enable_grad():
                block = ctx.rows(start, stop, tensors)
            if of_x is not None:
                of_x = of_x + part @ block.to(x.dtype) if again else of_x.addmm_(part, block.detach().to(x.dtype))
            if wanted:
                of_block = (part.mT @ flat).to(block.dtype)
                leaves = [tensors[i] for i in wanted]
                found = torch.autograd.grad(block, leaves, of_block, create_graph=again, materialize_grads=True)
                for i, g in zip(wanted, found, strict=True):
                    so_far = of_tensors[i]
                    of_tensors[i] = g if so_far is None else so_far + g
        return (None if of_x is None else of_x.reshape(x.shape), None, None, *of_tensors)


def _spans(m: int, n: int) -> list[tuple[int, int]]:
    step = max(1, ENTRIES // max(n, 1))
    return [(start, min(start + step, m)) for start in range(0, m, step)]
