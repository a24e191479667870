"""ALLoRA: LoRA without dropout and scale, whose rows learn faster the shorter they are.

    W' = W + B A,    gradient of row B_i multiplied by 1 / sqrt(|B_i| + 1 / eta^2)

At the start, where B = 0, that is eta: rows leave zero fast and slow down as they grow.

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Huang and Balestriero 2024, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws". The factor per row is
the abstract's ("inversely proportional to the parameters' norm"); its exact form was not checked against the paper.
"""

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.methods.adapt.recipe import Recipe, added, check_rank
from eckart.optim.gradients import factor_rule


def allora(*, rank: int = 16, eta: float = 8.0) -> Recipe:
    """LoRA whose rows learn faster the shorter they are.

    Args:
        rank: r.
        eta: times the plain gradient that a row of zeros gets.
    """
    check_rank(rank)
    if eta <= 0:
        raise EckartError(f"eta must be positive, got {eta}")

    def by_length(up: Tensor, down: Tensor, of_up: Tensor, of_down: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.linalg.vector_norm(up, dim=1, keepdim=True)
        return of_up / (lengths + eta**-2).sqrt(), of_down

    return Recipe(lambda layer: Adapter([added(layer, rank, 1.0)]), rate=1e-3, rule=factor_rule(by_length))
