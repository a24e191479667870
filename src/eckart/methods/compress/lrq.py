"""LRQ: which code every weight takes is learned on the outputs of whole blocks, through low-rank scales.

    W' = s clamp(round(W / (s exp(L R + r + c)))),    min over s, L, R, r, c of  mean | block'(x^) - block(x) |^2

Structure: dense, in codes of b bits with a scale and a zero point per group; divisors are needed while learning only.
Metric: none before training. Budget: none, all parameters remain. Solver: round to nearest, scales by search. Trained:
scales and divisors, blockwise, AdamW at 9e-4.

Source: Lee et al. 2025, "LRQ: Optimizing post-training quantization for large language models by learning low-rank
weight-scaling matrices"; rank 1,024 and rate 9e-4 as in the authors' code (onliwad101/FlexRound_LRQ). Theirs are 5,000
steps of few sequences and a scale per row; here 40 passes over 128 windows in batches of 16, and groups of 128.
"""

from eckart.fit import Metric
from eckart.methods.compress.recipe import Recipe, check_least


def lrq(*, rank: int = 1024) -> Recipe:
    """Codes learned on block outputs through low-rank scales.

    Args:
        rank: of the matrix of divisors; at most a quarter of a layer's shorter side is used.
    """
    check_least("rank", rank, 1)
    return Recipe(
        metric=lambda data: Metric(),
        reduces=False,
        bits=4,
        rounding="nearest",
        scale_rank=rank,
        heal=40,
        heal_rate=9e-4,
    )
