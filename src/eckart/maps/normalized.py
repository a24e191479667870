"""Magnitude times direction: a map whose rows have prescribed lengths."""

from torch import Tensor

from eckart.maps.base import LinearMap, Product, linear_map, require_shape
from eckart.maps.dense import Diagonal
from eckart.maps.norm import row_norms


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
        return self.direction.flops(tokens) + tokens * self.shape[0] + self.direction.flops(self.shape[1])

    def row_scale(self) -> Tensor:
        """Return magnitude / |row| for every row, (m,)."""
        norms = row_norms(self.direction)
        return self.magnitude * (norms > 0) / norms.where(norms > 0, 1.0)
