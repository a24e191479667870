"""One narrow matrix repeated along the inputs."""

from torch import Tensor
from torch.nn import functional as F

from eckart.maps.base import Blocks, LinearMap, linear_map, require
from eckart.maps.dense import Dense


@linear_map
class Tiled(LinearMap):
    """W = [D D ... D], cut at n columns: column i is column i mod r of D, (m r numbers).

    The inputs are added up over the tiles first, so that one thin product is all that is left.

    Attributes:
        tile: D, (m, r).
        width: n.
    """

    tile: Tensor
    width: int

    def __post_init__(self) -> None:
        fits = self.tile.ndim == 2 and 0 < self.tile.shape[1] <= self.width
        require(fits, f"Tiled to {self.width} columns", f"tile {tuple(self.tile.shape)}", "(m, r) with 0 < r <= width")

    @property
    def shape(self) -> tuple[int, int]:
        return self.tile.shape[0], self.width

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(self.folded(x), self.tile)

    def folded(self, x: Tensor) -> Tensor:
        """Return the inputs added up over the tiles: x (..., n) -> (..., r)."""
        r = self.tile.shape[1]
        count = -(-self.width // r)
        if count * r != self.width:
            x = F.pad(x, (0, count * r - self.width))
        return x.reshape(*x.shape[:-1], count, r).sum(-2)

    @property
    def T(self) -> LinearMap:
        r = self.tile.shape[1]
        whole, rest = divmod(self.width, r)
        pieces = [Dense(self.tile.mT)] * whole + ([Dense(self.tile[:, :rest].mT)] if rest else [])
        return Blocks(tuple((piece,) for piece in pieces))

    def dense(self) -> Tensor:
        return self.tile.repeat(1, -(-self.width // self.tile.shape[1]))[:, : self.width].contiguous()

    def flops(self, tokens: int = 1) -> int:
        r = self.tile.shape[1]
        return tokens * (2 * self.tile.numel() + -(-self.width // r) * r)

    def dense_flops(self) -> int:
        return 0
