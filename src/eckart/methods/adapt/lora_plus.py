"""LoRA+: the second factor learns faster than the first.

    W' = W + (alpha / r) B A,    rate(B) = ratio rate(A)

With one rate for both, B moves too little as the width grows: A's features then change at a vanishing share.

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4; the ratio of its examples.
"""

from dataclasses import replace

from eckart.errors import EckartError
from eckart.methods.adapt.lora import lora
from eckart.methods.adapt.recipe import Recipe


def lora_plus(*, rank: int = 16, alpha: float = 16.0, dropout: float = 0.0, ratio: float = 20.0) -> Recipe:
    """LoRA whose B learns at a multiple of the rate of A.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
        dropout: share of the inputs of the low-rank map that is dropped in training.
        ratio: learning rate of B over that of A, which `parameter_groups` hands to the optimizer.
    """
    if ratio < 1:
        raise EckartError(f"ratio must be at least 1, got {ratio}")
    return replace(lora(rank=rank, alpha=alpha, dropout=dropout), rate=2e-4, shares={"delta.up.": ratio})
