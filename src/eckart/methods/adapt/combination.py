"""Making adapters of several tasks into one change: plain sums and means.

    sum: tau = sum_t tau_t          mean: tau = sum_t tau_t / T          tau_t = f_t(W) - W

Gives: one change, (m, n) dense.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.maps import Dense, LinearMap


@dataclass(frozen=True, slots=True)
class Combination:
    """A way to combine adapters.

    Attributes:
        combine: the tasks' changes of a layer, each (m, n) -> what is added for all tasks, or for each.
        per_task: whether every task gets a change of its own.
    """

    combine: Callable[[Sequence[Tensor]], Sequence[LinearMap]]
    per_task: bool


def summed() -> Combination:
    """Add the changes up."""
    return Combination(lambda changes: [Dense(torch.stack(list(changes)).sum(0))], per_task=False)


def averaged() -> Combination:
    """Take the mean of the changes."""
    return Combination(lambda changes: [Dense(torch.stack(list(changes)).mean(0))], per_task=False)
