"""Task masks: one merged change for all tasks, and a bit per weight and task that says where it serves the task.

    tau = sum_t tau_t          mask_t = 1[ |tau_t| > threshold |tau - tau_t| ]          W_t = W + mask_t * tau

Where the other tasks' sum is small beside a task's own change, the merged change stands for it; elsewhere the base
does. A task costs one bit per weight beside the shared tau. The task is asked for by name, where the paper's robots
have a router that looks at the first observation.

Gives: one change per task, (m, n) dense with a mask of bits; tau is shared in memory.

Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression", and Fu et al. 2025,
"MergeVLA: Cross-Skill Model Merging Toward a Generalist Vision-Language-Action Agent": threshold 0.6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.maps import Dense, Masked, packed
from eckart.methods.adapt.combination import Combination


def task_masks(*, threshold: float = 0.6) -> Combination:
    """One merged change for all tasks, and a bit per weight and task that says where it serves the task.

    Args:
        threshold: how large a task's change must be beside the sum of the others' to be kept.
    """
    if threshold < 0:
        raise EckartError(f"threshold must not be negative, got {threshold}")

    def combine(changes: Sequence[Tensor]) -> list[Masked]:
        total = torch.stack(list(changes)).sum(0)
        masks = [change.abs() > threshold * (total - change).abs() for change in changes]
        return [Masked(Dense(total), packed(mask)) for mask in masks]

    return Combination(combine, per_task=True)
