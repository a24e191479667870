"""Exchanging columns and rows of trained low-rank factors for others, one at a time, without changing their sum.

What leaves the product B A is kept in a frozen change F: low rank with a column per term, or dense where that is less.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from eckart.hosts import host, map_of
from eckart.hosts.adapter import Plus
from eckart.maps import Dense, LowRank
from eckart.optim import count_apart, forget


class Turns(nn.Module):
    """Rule of the gradients while columns of B and rows of A take turns: those that rest have none.

    Attributes:
        rested_up: for each column of B minus the steps it still rests, then the steps since; infinite if it never did.
        rested_down: the same for the rows of A.
        spare_up: columns that wait, (count, m).
        spare_down: rows that wait, (count, n).
        first: the column of F that the first switch is written to.
        wait: steps that the counterpart of what was exchanged rests.
    """

    rested_up: Tensor
    rested_down: Tensor
    spare_up: Tensor
    spare_down: Tensor

    def __init__(self, rank: int, spare: tuple[Tensor, Tensor], first: int, wait: int) -> None:
        super().__init__()
        self.first, self.wait = first, wait
        never = torch.full((rank,), math.inf, device=spare[0].device)
        for name, tensor in (
            ("rested_up", never),
            ("rested_down", never.clone()),
            ("spare_up", spare[0].mT.contiguous()),
            ("spare_down", spare[1]),
        ):
            self.register_buffer(name, tensor)

    def forward(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Return B and A, without gradients where they rest."""
        return (
            torch.where(self.rested_up < 0, up.detach(), up),
            torch.where(self.rested_down[:, None] < 0, down.detach(), down),
        )

    def rest(self, up: nn.Parameter, down: nn.Parameter, optimizer: Optimizer) -> None:
        """Count one more step, for the optimizer as well."""
        self.rested_up.add_(1)
        self.rested_down.add_(1)
        count_apart(optimizer, up, self.rested_up)
        count_apart(optimizer, down, self.rested_down[:, None])

    def take(self, turn: int, fold: Plus, up: nn.Parameter, down: nn.Parameter, optimizer: Optimizer) -> None:
        """Exchange the column of B and the row of A whose turn it is, in place."""
        rank, slot = len(self.rested_up), turn % len(self.spare_up)
        i, j, column = turn % rank, (turn + rank // 2) % rank, self.first + 2 * turn
        _add(fold, column, _swap(up[:, i], self.spare_up[slot]), down[i])
        forget(optimizer, down, (i,))
        self.rested_down[i] = -self.wait
        _add(fold, column + 1, up[:, j], _swap(down[j], self.spare_down[slot]))
        forget(optimizer, up, (slice(None), j))
        self.rested_up[j] = -self.wait


def extend(fold: Plus, columns: int) -> int:
    """Make room for more terms of F, and return how many columns it has already."""
    held, (m, n) = map_of(fold.delta), map_of(fold.delta).shape
    if isinstance(held, Dense) or not columns:
        return 0
    low = cast(LowRank, held)
    if (low.rank + columns) * (m + n) < m * n:
        wide = LowRank(F.pad(low.up.detach(), (0, columns)), F.pad(low.down.detach(), (0, 0, 0, columns)))
        fold.delta = host(wide)
    else:
        fold.delta = host(Dense(low.dense().detach()))
    return low.rank


def _add(fold: Plus, column: int, up: Tensor, down: Tensor) -> None:
    """Add the term up down^T to F."""
    held = map_of(fold.delta)
    if isinstance(held, LowRank):
        held.up[:, column], held.down[column] = up, down
    else:
        cast(Dense, held).weight.addr_(up, down)


def _swap(used: Tensor, spare: Tensor) -> Tensor:
    """Exchange two vectors in place, and return what that adds to the used one."""
    old = used.clone()
    used.copy_(spare)
    spare.copy_(old)
    return used - old
