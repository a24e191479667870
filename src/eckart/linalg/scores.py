"""What attention loses when its scores are computed from the first r of k components only, without computing it twice.

    s_ij = c a_i . b_j,    s'_ij = c a_i,:r . b_j,:r,    |s_ij - s'_ij| <= e_i(r) = c |a_i,r:| max_j |b_j,r:|

A softmax whose scores move by at most e moves by at most tanh(e / 2) in total variation: no ratio of two of its
probabilities changes by more than e^(2 e), and two points with odds e^e and e^-e are the worst case. The output of the
head, a mean of values under these probabilities, moves by at most that times the diameter of the values.

Over all pairs together the error of the scores is known exactly: sum_ij (s_ij - s'_ij)^2 = c^2 <A^T A, B^T B> over the
components from r on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def score_errors(left: Tensor, right: Tensor, ranks: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Return for every rank the bound on how far the softmax moves, and the root mean square error of the scores.

    Args:
        left: a (b, h, g, q, k), the queries of the g heads that share a key head.
        right: b (b, h, t, k), the keys.
        ranks: components used, each from 0 to k.
        scale: c >= 0.

    Returns:
        the mean over heads and queries of the bound on the total variation, and the root mean square over heads and all
        pairs of the error of a score, both (b, len(ranks)).
    """
    peaks = _tails(right, ranks).amax(2)[:, :, None, None]  # (b, h, 1, 1, R)
    bound = torch.tanh(_tails(left, ranks) * peaks * (scale / 2)).mean((1, 2, 3))
    pairs = left.shape[3] * right.shape[2]
    both = (left.mT @ left) * (right.mT @ right)[:, :, None] / pairs  # (b, h, g, k, k)
    squares = torch.stack([both[..., r:, r:].sum((-1, -2)).clamp_min(0).mean((1, 2)) for r in ranks], -1)
    return bound, scale * squares.sqrt()


def _tails(vectors: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the lengths (..., R) of vectors (..., k) without their first r entries."""
    rest = vectors.square().flip(-1).cumsum(-1).flip(-1)
    padded = torch.cat([rest, torch.zeros_like(rest[..., :1])], -1)
    return padded[..., list(ranks)].sqrt()
