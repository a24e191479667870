"""LoRA: a frozen weight plus a trained low-rank one.

    W' = W + (alpha / r) B A        A (r, n) uniform in +-1/sqrt(n), B (m, r) = 0

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from eckart.hosts import Adapter
from eckart.methods.adapt.recipe import Recipe, added, check_rank


def lora(*, rank: int = 16, alpha: float = 16.0, dropout: float = 0.0) -> Recipe:
    """A frozen weight plus a trained low-rank one.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
        dropout: share of the inputs of the low-rank map that is dropped in training.
    """
    check_rank(rank)
    return Recipe(lambda layer: Adapter([added(layer, rank, alpha / rank, dropout=dropout)]), rate=1e-3)
