"""Changes that are computed entry by entry from a few trained numbers, such as masked products of factors.

    W' = W + s D(W)        y += s x D^T

No structure of the factors survives an entrywise mask or product, so D has to be written out. It is written a block of
rows at a time, once for the product and once more in backward, and never kept: autograd holds x and what D is made of.

Legend: W (m, n), D (m, n), x (t, n).
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from eckart.hosts.adapter import Change, Inner, scaled
from eckart.maps import Dense, LinearMap, Sum, multiply_by_rows, rows_of, unpacked


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
                weight = rows_of(pytree.tree_unflatten(list(tensors[len(own) :]), tree), start, stop)
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
