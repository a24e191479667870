"""rsLoRA: LoRA whose scale keeps the size of outputs and gradients as the rank grows.

    W' = W + (alpha / sqrt(r)) B A

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", theorem 3.2.
"""

from eckart.hosts import Adapter
from eckart.methods.adapt.recipe import Recipe, added, check_rank


def rslora(*, rank: int = 16, alpha: float = 16.0, dropout: float = 0.0) -> Recipe:
    """LoRA scaled by alpha over the root of the rank.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / sqrt(r).
        dropout: share of the inputs of the low-rank map that is dropped in training.
    """
    check_rank(rank)
    return Recipe(lambda layer: Adapter([added(layer, rank, alpha / rank**0.5, dropout=dropout)]), rate=5e-4)
