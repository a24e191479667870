"""Trained rank pruning: training interrupted every few steps by a truncation, under a nuclear norm penalty.

    every 20 steps:  W <- U_k S_k V_k^T,    k the smallest rank with  sum_{i<=k} s_i^2 >= e sum_i s_i^2
    in between:      dL/dW + lambda U V^T,  the subgradient of |W|_* at the last truncation

The network learns to bear the truncations, so that the last one costs little. Ranks follow from one threshold on the
share of energy dropped, the criterion of the truncations themselves, instead of the fixed e that reaches no budget.

Structure: low rank. Metric: energy for the choice, input second moment for the last truncation. Budget: learned.
Solver: AdamW. Trained: everything inside the blocks, nothing behind the last truncation unless `tune` says so. The
interval and lambda = 3e-4 are the paper's. Scaled to minutes and to a model that is trained already: 300 steps, and
e = 0.98 instead of 0.9 for images.

Source: Xu et al. 2019, "Trained rank pruning for efficient deep neural networks", section 3 ("TRP1" without channel or
spatial decomposition, which linear layers do not have); settings as in yuhuixu1993/Trained-Rank-Pruning.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.fit import Metric
from eckart.linalg import truncated_svd
from eckart.methods.compress.learner import Layers, LearnedLayer, Learner, course
from eckart.methods.compress.recipe import Recipe, check_least, check_share, input_moment
from eckart.methods.training import Step


class Truncated(LearnedLayer):
    """A dense W that is truncated from time to time."""

    isometry: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), bias)
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("isometry", torch.zeros_like(weight))  # U V^T of the last truncation
        self.truncate(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def truncate(self, energy: float) -> None:
        """Drop the smallest singular values that together hold no more than 1 - energy of the squared norm."""
        svd = truncated_svd(self.weight)
        k = max(1, int((svd.errors[:-1] > (1 - energy) * svd.errors[0]).sum()))
        self.isometry.copy_(svd.left[:, :k] @ svd.right[:k])
        if energy < 1:
            self.weight.copy_((svd.left[:, :k] * svd.values[:k]) @ svd.right[:k])

    def matrix(self) -> Tensor:
        return self.weight.detach()

    def scores(self) -> Tensor:
        """Return the share of the squared norm that goes with every component and all behind it, (K,)."""
        errors = truncated_svd(self.weight.detach()).errors
        return errors[:-1] / errors[0].clamp_min(torch.finfo(errors.dtype).tiny)


@dataclass(frozen=True, slots=True)
class TruncationLearner(Learner):
    """The training of trained rank pruning.

    Attributes:
        penalty: lambda.
        energy: e.
        interval: steps between truncations.
    """

    penalty: float = 3e-4
    energy: float = 0.98
    interval: int = 20

    def layer(
        self, weight: Tensor, bias: Tensor | None, share: float, generator: torch.Generator, seen: Metric
    ) -> LearnedLayer:
        return Truncated(weight, bias)

    def objective(self, loss: Tensor, layers: Layers, step: Step) -> Tensor:
        if not self.penalty:
            return loss
        norms = [(cast(Truncated, layer).weight * layer.isometry).sum() for layer in layers.values()]
        return loss + self.penalty * torch.stack(norms).sum()

    def after(self, layers: Layers, step: Step) -> bool:
        if (step.index + 1) % self.interval == 0:
            for layer in layers.values():
                layer.truncate(self.energy)
        return False


def trp(
    *,
    steps: int = 300,
    tune: int = 0,
    rate: float = 1e-3,
    batch: int = 4,
    penalty: float = 3e-4,
    energy: float = 0.98,
    interval: int = 20,
) -> Recipe:
    """Training with a truncation every few steps and a nuclear norm penalty, one training for all budgets.

    Args:
        steps: steps of the training.
        tune: steps in which the factors of the last truncation are trained.
        rate: learning rate of both.
        batch: windows per step.
        penalty: lambda, weight of the nuclear norms.
        energy: share of a layer's squared norm that a truncation leaves.
        interval: steps between truncations.
    """
    check_least("penalty", penalty, 0)
    check_share("energy", energy)
    check_least("interval", interval, 1)
    check_least("steps", steps, 1)
    learner = TruncationLearner(
        search=course(steps, rate, batch),
        tuning=course(tune, rate, batch),
        everything=True,
        penalty=penalty,
        energy=energy,
        interval=interval,
    )
    return Recipe(metric=input_moment, allocation="threshold", learner=learner)
