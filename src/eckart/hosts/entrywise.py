"""Changes that are computed entry by entry from a few trained numbers, such as masked products of factors.

    W' = W + s D(W)        y += s x D^T

No structure of the factors survives an entrywise mask or product, so D has to be written out. It is written a block of
rows at a time, once for the product and once more in backward, and never kept: autograd holds x and what D is made of.
Where W is a matrix in float32 or wider it is added to the block, so that one product serves both: forward and backward
cost one dense product more than W alone, that of D's gradient.

Legend: W (m, n), D (m, n), x (t, n).
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eckart.hosts.adapter import Change, Inner, multiply_written, scaled
from eckart.hosts.host import host, map_of
from eckart.linalg import distances, kth_smallest
from eckart.maps import Dense, LinearMap, Sum, in_one_dtype, multiply_by_rows, rows_of, unpacked


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
        """Return rows of D, (stop - start, n), from the change's own tensors and the same rows of W if it reads it.

        What is returned may be written over.
        """

    def of(self, inner: LinearMap) -> LinearMap:
        weight = in_one_dtype(inner).dense() if self.reads_weight else None
        return Sum((inner, scaled(Dense(self.rows(0, self.shape[0], self.made_of(), weight)), self.scale)))

    def call(self, x: Tensor, inner: Inner) -> Tensor:
        own = self.drawn() if self.training else self.made_of()
        if inner.writable is not None:
            return multiply_written(x, inner.writable, self.changed, own)
        y = inner.call(x)
        leaves, tree = pytree.tree_flatten(in_one_dtype(inner.map())) if self.reads_weight else ([], None)

        def rows(start: int, stop: int, tensors: Sequence[Tensor]) -> Tensor:
            weight = None
            if tree is not None:
                weight = rows_of(pytree.tree_unflatten(list(tensors[len(own) :]), tree), start, stop)
            return self.rows(start, stop, tensors[: len(own)], weight)

        product = multiply_by_rows(x, rows, (*own, *leaves), self.shape[0])
        return y + (self.scale * product).to(y.dtype)

    def changed(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor) -> Tensor:
        """Return rows of W + s D from the change's own tensors and the same rows of W, dense."""
        change = self.rows(start, stop, own, weight if self.reads_weight else None)
        if change.dtype != torch.promote_types(change.dtype, weight.dtype):
            return weight + self.scale * change
        return (change if self.scale == 1.0 else change.mul_(self.scale)).add_(weight)


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
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        self.register_buffer("bits", bits)

    def made_of(self) -> tuple[Tensor, ...]:
        return self.up, self.down, self.bits

    def rows(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        up, down, bits = own
        product: Tensor = up[start:stop] @ down
        return product.mul_(unpacked(bits[start:stop], self.shape[1], product.dtype))


class ElasticFactors(MaskedFactors):
    """Masked factors of which a step of training takes the first k columns and rows, k one of r, 3 r / 4 and r / 2."""

    def drawn(self) -> tuple[Tensor, ...]:
        r = self.down.shape[0]
        # torch's own generator, which gradient checkpointing puts back for the second pass
        k = (r, 3 * r // 4, r // 2)[int(torch.randint(3, ()))]
        return self.up[:, :k], self.down[:k], self.bits


class Multiplied(Entrywise):
    """W + s W * D, entry by entry.

    Args:
        factor: D (m, n).
        scale: s.
    """

    reads_weight = True

    def __init__(self, factor: LinearMap, scale: float = 1.0) -> None:
        super().__init__(factor.shape, scale)
        self.factor = host(factor)

    def made_of(self) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(map_of(self.factor)))

    def rows(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        product = self._factor(start, stop, own)
        return product.clone() if weight is None else product * weight

    def _factor(self, start: int, stop: int, own: Sequence[Tensor]) -> Tensor:
        factor = pytree.tree_unflatten(list(own), pytree.tree_structure(map_of(self.factor)))
        return rows_of(factor, start, stop)

    def changed(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor) -> Tensor:
        return torch.addcmul(weight, self._factor(start, stop, own), weight, value=self.scale)


class Grouped(Entrywise):
    """W + s W * (b_i a_p(i)j), p(i) = floor(i r / m): r groups of rows, each with a vector of its own.

    Args:
        columns: a (r, n).
        rows: b (m,).
        scale: s.
    """

    reads_weight = True

    def __init__(self, columns: Tensor, rows: Tensor, scale: float) -> None:
        super().__init__((rows.shape[0], columns.shape[1]), scale)
        self.of_columns, self.of_rows = nn.Parameter(columns), nn.Parameter(rows)

    def made_of(self) -> tuple[Tensor, ...]:
        return self.of_columns, self.of_rows

    def rows(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        of_columns, of_rows = own
        group = torch.arange(start, stop, device=of_rows.device) * of_columns.shape[0] // self.shape[0]
        # as a product of matrices, whose derivative is one as well
        spread = of_rows.new_zeros(stop - start, of_columns.shape[0]).scatter(
            1, group[:, None], of_rows[start:stop, None]
        )
        product: Tensor = spread @ of_columns
        return product if weight is None else product * weight


class Kernel(Entrywise):
    """W + K * |K| where |K| >= q,    K_ij = 0.1 (|a_j - b_i| - |c_j - d_i|), q the quantile that leaves a share of K.

    Args:
        inputs: a and c, (2, n, h).
        outputs: b and d, (2, m, h).
        density: the share.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, density: float) -> None:
        super().__init__((outputs.shape[1], inputs.shape[1]))
        self.inputs, self.outputs, self.density = nn.Parameter(inputs), nn.Parameter(outputs), density

    def made_of(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            sizes = _kernel(self.inputs, self.outputs).abs_().flatten()
            dropped = sizes.numel() - max(1, round(self.density * sizes.numel()))
            least = kth_smallest(sizes, dropped + 1)
        return self.inputs, self.outputs, least

    def rows(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        inputs, outputs, least = own
        kernel = _kernel(inputs, outputs[:, start:stop])
        size = kernel.detach().abs()
        return kernel * size.mul_(size.clone().ge_(least))


def _kernel(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return K (m, n) of vectors (2, n, h) of the inputs and (2, m, h) of the outputs."""
    (a, c), (b, d) = 0.1 * inputs, 0.1 * outputs
    return distances(b, a) - distances(d, c)
