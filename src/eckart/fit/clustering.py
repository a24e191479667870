"""Which layers share a basis: merged only while the predicted error of truncating them together stays under a limit.

    merge C and D while   predicted e_r(C + D)^2  <=  threshold * sum over their layers i of e_{r_i}(A_i)^2

with A_i = W_i L / |W_i L| whitened by one input moment L L = G and of unit norm, r the rank that the budget gives the
merged group and r_i the one it gives layer i alone, at the same share of dense numbers. A threshold of 1 thus merges
where sharing is predicted to cost nothing at equal size; the paper's threshold, an absolute error at a rank chosen by
hand, needs a budget to mean anything. Three algorithms, by what they predict from (linalg/stacked.py):

- "union": from the individual spectra alone, best pair first. Nothing is decomposed again. It is a guarantee, and a
  loose one: spectra cannot tell that two layers agree, so it only merges at thresholds above 1.
- "residual": from what the leading directions of one group leave of the other, best pair first. A guarantee as well;
  a decomposition or several per pair.
- "incremental": from the truncated SVD of the stacked sketches, in one pass: every layer joins the group that takes it
  best, or opens one. One decomposition per layer and group, and the tightest prediction.

Legend: A_i (m_i, n), e_r the error of rank r, g layers.

Source: Shamrai 2026, "Concatenated Matrix SVD" (arXiv 2601.11626), of which the abstract was at hand: three algorithms
that trade speed, provable accuracy and scalability; whitening, the limit and the details are our own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from eckart.errors import EckartError
from eckart.linalg import Sketch, residual_bound, stacked, union_bound

Algorithm = Literal["union", "residual", "incremental"]


@dataclass(frozen=True, slots=True)
class _Cluster:
    """Layers that share a basis: their positions, rows, stacked sketch (not for "union"), and error when separate."""

    members: tuple[int, ...]
    rows: int
    blocks: tuple[Sketch, ...]
    joint: Sketch
    separate: float


def cluster(
    sketches: Sequence[Sketch],
    rows: Sequence[int],
    rank_of: Callable[[int], int],
    *,
    threshold: float = 1.0,
    algorithm: Algorithm = "incremental",
) -> list[list[int]]:
    """Divide layers into groups that share a basis.

    Args:
        sketches: of every A_i, with as many pairs as the largest rank needs.
        rows: m_i.
        rank_of: the rank the budget gives a group of that many rows.
        threshold: largest allowed ratio of the joint error to that of the layers on their own.
        algorithm: how the joint error is predicted.

    Returns:
        Positions of the layers of every group, ascending, groups by their first layer; groups of one are left alone.

    Raises:
        EckartError: for an unknown algorithm.
    """
    if algorithm not in get_args(Algorithm):
        raise EckartError(f"unknown algorithm {algorithm!r}; choose one of {', '.join(get_args(Algorithm))}")
    single = [
        _Cluster((i,), m, (one,), one, one.error(rank_of(m)))
        for i, (one, m) in enumerate(zip(sketches, rows, strict=True))
    ]
    merge = _one_pass if algorithm == "incremental" else _best_pairs
    found = merge(single, lambda a, b: _ratio(a, b, rank_of, algorithm), threshold, algorithm)
    return sorted(sorted(group.members) for group in found)


def _ratio(a: _Cluster, b: _Cluster, rank_of: Callable[[int], int], algorithm: Algorithm) -> float:
    """Return the predicted error of two groups merged over that of all their layers on their own."""
    rank, separate = rank_of(a.rows + b.rows), a.separate + b.separate
    if algorithm == "union":
        joint = union_bound((*a.blocks, *b.blocks), rank)
    elif algorithm == "residual":
        joint = min(residual_bound(a.joint, b.joint, rank), residual_bound(b.joint, a.joint, rank))
    else:
        joint = stacked(a.joint, b.joint, rank).error(rank)
    return joint / separate if separate > 0 else float("inf")


def _merged(a: _Cluster, b: _Cluster, algorithm: Algorithm) -> _Cluster:
    kept = max(a.joint.values.shape[0], b.joint.values.shape[0])
    joint = a.joint if algorithm == "union" else stacked(a.joint, b.joint, kept)
    return _Cluster(a.members + b.members, a.rows + b.rows, a.blocks + b.blocks, joint, a.separate + b.separate)


Ratio = Callable[[_Cluster, _Cluster], float]


def _best_pairs(clusters: list[_Cluster], ratio: Ratio, threshold: float, algorithm: Algorithm) -> list[_Cluster]:
    """Merge the pair with the least ratio until none is within the threshold."""
    alive = dict(enumerate(clusters))
    ratios = {(i, j): ratio(alive[i], alive[j]) for i in alive for j in alive if i < j}
    while ratios:
        (i, j), least = min(ratios.items(), key=lambda item: (item[1], item[0]))
        if least > threshold:
            break
        ratios = {pair: value for pair, value in ratios.items() if not {i, j} & set(pair)}
        made, new = _merged(alive.pop(i), alive.pop(j), algorithm), max((*alive, i, j)) + 1
        ratios |= {(k, new): ratio(other, made) for k, other in alive.items()}
        alive[new] = made
    return list(alive.values())


def _one_pass(clusters: list[_Cluster], ratio: Ratio, threshold: float, algorithm: Algorithm) -> list[_Cluster]:
    """Let every layer join the group with the least ratio, if that is within the threshold."""
    groups: list[_Cluster] = []
    for one in clusters:
        ratios = [(ratio(group, one), k) for k, group in enumerate(groups)]
        if ratios and min(ratios)[0] <= threshold:
            best = min(ratios)[1]
            groups[best] = _merged(groups[best], one, algorithm)
        else:
            groups.append(one)
    return groups
