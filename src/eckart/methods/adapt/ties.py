"""TIES: the large changes only, the sign that most of the mass has, and the mean of those that agree.

    tau_t <- the share `density` of tau_t with the largest |.|, the rest 0
    g = sign(sum_t tau_t)          tau = scale * mean over {t : sign(tau_t) = g} of tau_t, entry by entry

Every layer is trimmed by itself; the published code trims all weights of a model together.

Gives: one change, (m, n) dense.

Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models": density 0.2, scale 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.maps import Dense
from eckart.methods.adapt.combination import Combination


def ties(*, density: float = 0.2, scale: float = 1.0) -> Combination:
    """The large changes only, the sign that most of the mass has, and the mean of those that agree.

    Args:
        density: share of a task's change that is kept.
        scale: factor of the result.
    """
    if not 0 < density <= 1:
        raise EckartError(f"density must be above 0 and at most 1, got {density}")

    def combine(changes: Sequence[Tensor]) -> list[Dense]:
        kept = torch.stack([_trimmed(change, density) for change in changes])
        agree = kept.sign() == kept.sum(0).sign()
        return [Dense(scale * (kept * agree).sum(0) / agree.sum(0).clamp_min(1))]

    return Combination(combine, per_task=False)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """Return a matrix with all but its largest entries zero."""
    kept = torch.zeros_like(change).flatten()
    chosen = change.flatten().abs().topk(max(1, round(density * change.numel()))).indices
    kept[chosen] = change.flatten()[chosen]
    return kept.view_as(change)
