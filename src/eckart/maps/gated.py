"""Maps whose rank is chosen anew for every call: the leading components of one ordered factorization.

    W_r = U_:r V_:r,    y^T W_r x = (U_:r^T y) . (V_:r x)

What is chosen depends on the input, so this is no linear map and no matrix stands for it; at every rank it is one.
"""

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from eckart.errors import EckartError
from eckart.maps.base import require
from eckart.maps.lowrank import LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Gated:
    """Maps side by side, one per head, all used at the rank that a gate chooses.

    Attributes:
        up: U (h, m, k), columns in order of importance.
        down: V (h, k, n).
        ranks: those a gate may choose, ascending; the last is k, the whole map.
    """

    up: Tensor
    down: Tensor
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        came = f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)}"
        fits = self.up.ndim == 3 and self.down.ndim == 3 and self.up.shape[::2] == self.down.shape[:2]
        require(fits, "Gated", came, "(h, m, k) and (h, k, n)")
        fits = len(self.ranks) > 0 and list(self.ranks) == sorted(set(self.ranks)) and self.ranks[0] >= 0
        require(
            fits and self.ranks[-1] == self.rank, "Gated", f"ranks {self.ranks}", f"ascending ones up to {self.rank}"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of every head's map."""
        return self.up.shape[1], self.down.shape[2]

    @property
    def rank(self) -> int:
        """The largest rank, k."""
        return self.up.shape[2]

    def __call__(self, x: Tensor, rank: int) -> Tensor:
        """Apply the maps at a rank: x (..., h, t, n) -> (..., h, t, m)."""
        return self.right(x, rank) @ self.up[..., :rank].mT

    def left(self, y: Tensor, rank: int) -> Tensor:
        """Return U_:r^T y for y (..., h, t, m), as (..., h, t, r)."""
        return y @ self.up[..., :rank]

    def right(self, x: Tensor, rank: int) -> Tensor:
        """Return V_:r x for x (..., h, t, n), as (..., h, t, r)."""
        return x @ self.down[:, :rank].mT

    def at(self, rank: int, head: int) -> LowRank:
        """Return the linear map of one head at a rank."""
        return LowRank(self.up[head, :, :rank], self.down[head, :rank])

    def dense(self) -> NoReturn:
        """Raise an `EckartError`: there is no such matrix."""
        raise EckartError(
            f"{self!r} has another rank for every input, so no matrix stands for it; at(rank, head) has one"
        )

    def __repr__(self) -> str:
        return f"Gated[{len(self.up)} of {self.shape[0]}x{self.shape[1]}](ranks={self.ranks})"
