"""A matrix whose rows come from several others in turn: those of some rows may be stored otherwise than the rest."""

from typing import cast

import torch
from torch import Tensor

from eckart.maps.base import Blocks, LinearMap, Product, linear_map, require, require_shape
from eckart.maps.permutation import Permutation, inverse_order
from eckart.maps.quantized import Quantized


@linear_map
class Interleaved(LinearMap):
    """W_i = the next row of maps[which_i], each map's rows in their own order.

    Attributes:
        maps: at least one map, all of one in size.
        which: (m,) uint8, the map that each row is of; as many rows of a map as it has.
    """

    maps: tuple[LinearMap, ...]
    which: Tensor

    def __post_init__(self) -> None:
        require(0 < len(self.maps) <= 256, "Interleaved", f"{len(self.maps)} maps", "1 to 256")
        widths = [m.shape[1] for m in self.maps]
        require(len(set(widths)) == 1, "Interleaved", f"rows of lengths {widths}", "rows of one length")
        require(self.which.dtype == torch.uint8, "Interleaved which", f"dtype {self.which.dtype}", "uint8")
        require_shape("Interleaved which", self.which, sum(m.shape[0] for m in self.maps))

    @property
    def shape(self) -> tuple[int, int]:
        return self.which.shape[0], self.maps[0].shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([m(x) for m in self.maps], dim=-1).index_select(-1, interleaving(self.which))

    @property
    def T(self) -> LinearMap:
        rows = Permutation(inverse_order(interleaving(self.which)))
        return Product((Blocks((tuple(m.T for m in self.maps),)), rows))

    def dense(self) -> Tensor:
        return torch.cat([m.dense() for m in self.maps]).index_select(0, interleaving(self.which))

    def select(self, rows: Tensor, order: Tensor | None = None) -> Tensor:
        """Return some rows of matrices of codes: indices (...) int -> (..., n).

        Args:
            rows: which.
            order: `interleaving` of `which`, if it is at hand.
        """
        places = (interleaving(self.which) if order is None else order)[rows.flatten().long()]
        out, start = None, 0
        for m in self.maps:
            inside = (places >= start) & (places < start + m.shape[0])
            found = cast(Quantized, m).select(torch.where(inside, places - start, 0))
            out = found if out is None else torch.where(inside[:, None], found, out)
            start += m.shape[0]
        return cast(Tensor, out).view(*rows.shape, self.shape[1])

    def flops(self, tokens: int = 1) -> int:
        return sum(m.flops(tokens) for m in self.maps)

    def dense_flops(self) -> int:
        return sum(m.dense_flops() for m in self.maps)

    def validate(self) -> None:
        """Raise an `EckartError` unless every map has as many rows as are said to be of it."""
        for m in self.maps:
            m.validate()
        counts = torch.bincount(self.which.long(), minlength=len(self.maps)).tolist()
        rows = [m.shape[0] for m in self.maps]
        require(counts == rows, "Interleaved", f"{counts} rows of the maps", f"{rows}, as many as they have")


def interleaving(which: Tensor) -> Tensor:
    """Return where each row is found among the rows of all maps, one map after the other: (m,) -> (m,) int32."""
    return inverse_order(which.argsort(stable=True).to(torch.int32))
