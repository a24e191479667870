"""Magnitude times direction: a map whose rows have prescribed lengths."""

import math

from torch import Tensor

from eckart.maps.base import LinearMap, Product, linear_map, require_shape
from eckart.maps.dense import Diagonal
from eckart.maps.norm import squared_row_norms, squared_row_norms_flops


@linear_map
class RowNormalized(LinearMap):
    """W = diag(magnitude / |rows of D|) D, the weight decomposition of DoRA (Liu et al. 2024, eq. 2, by output row).

    Rows of D that are zero stay zero.

    Attributes:
        magnitude: (m,), the length of each row of W.
        direction: D, (m, n).
    """

    magnitude: Tensor
    direction: LinearMap

    def __post_init__(self) -> None:
        require_shape("RowNormalized magnitude", self.magnitude, self.direction.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return self.direction.shape

    def __call__(self, x: Tensor) -> Tensor:
        return self.direction(x) * self.row_scale()

    @property
    def T(self) -> LinearMap:
        return Product((self.direction.T, Diagonal(self.row_scale())))

    def dense(self) -> Tensor:
        return self.direction.dense() * self.row_scale()[:, None]

    def flops(self, tokens: int = 1) -> int:
        return self.direction.flops(tokens) + tokens * self.shape[0] + self._row_scale_flops()

    def dense_flops(self) -> int:
        return self.direction.dense_flops() + math.prod(self.shape) + self._row_scale_flops()

    def row_scale(self) -> Tensor:
        """Return magnitude / |row| for every row, (m,)."""
        squares = squared_row_norms(self.direction)
        # Zero rows are taken out before the root: its gradient at zero is infinite, and a zero start would become NaN.
        norms = squares.where(squares > 0, 1.0).sqrt()
        return (self.magnitude / norms).where(squares > 0, 0.0).to(self.magnitude.dtype)

    def _row_scale_flops(self) -> int:
        return squared_row_norms_flops(self.direction) + self.shape[0]
