"""Low-rank maps whose leading components have more bits than later ones: reverse water-filling, then term by term.

    W' = sum_t Q_bt(U_t) Q_bt(V_t),    component i gets the b that minimises  s_i^2 q_b + lambda b

s_i^2 is what component i adds to the error if it is left out and q_b the share of it that remains at b bits (q_0 = 1).
As s_i falls with i, so do the bits: every lambda gives a few terms. Each term is fitted to what those before it left,
their rounding errors included.

Source: Cover and Thomas, "Elements of information theory", section 10.3.3, for the allocation.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eckart.fit.coded import coded, coded_blank
from eckart.fit.error import error_of
from eckart.fit.metric import Metric
from eckart.fit.quantize import Coding
from eckart.fit.regression import Regression, regress
from eckart.maps import Dense, LinearMap, LowRank, Sum

# Ranks per bits of every term, those of most bits first.
Terms = tuple[tuple[int, int], ...]
# Bits that are no codes: factors in float16.
HALF = 16
# Values of lambda tried for each set of bits.
STEPS = 48
# By what share an option must have less error than one that takes fewer bytes.
WORTH = 0.98
# What a term takes beside its codes: scales, and names in headers.
TERM_BYTES = 500


def coding_of(bits: int, group_size: int) -> Coding:
    """Return how numbers are stored at that many bits: with zero points where codes are few."""
    return Coding(bits, group_size, symmetric=bits == 8)


def noise(target: Tensor, regression: Regression, bits: int, group_size: int, dtype: torch.dtype) -> float:
    """Return the share q_b of its energy that a term loses by rounding, measured at the rank that holds half of it.

    It hardly depends on the rank.

    Args:
        target: W (m, n).
        regression: its solution.
        bits: b.
        group_size: entries that share a scale.
        dtype: of scales.
    """
    errors = regression.errors()
    rank = max(1, int((errors > errors[0] / 2).sum()))
    held = float(errors[0] - errors[rank])
    if bits == HALF or held <= 0:
        return 0.0
    map_ = fit_terms(target, regression.metric, ((bits, rank),), group_size, dtype)
    error = error_of(target, map_.to(torch.float64).dense(), regression.metric)
    return min(max(error - float(errors[rank]), 0.0) / held, 1.0)


def allocations(regression: Regression, noises: Mapping[int, float]) -> list[tuple[Terms, float]]:
    """Return terms of all sizes worth having, with the error predicted for each.

    Args:
        regression: the solution for W.
        noises: q_b by bits b.
    """
    errors, rank, size = regression.errors(), regression.rank, sum(regression.weight.shape)
    if rank == 0:
        return []
    energies, out = (errors[:-1] - errors[1:])[:rank].clamp_min(0), dict[Terms, float]()
    choices = [c for size in (1, 2) for c in itertools.combinations(sorted(noises), size)]
    for bits in dict.fromkeys((*choices, tuple(sorted(noises)))):
        widths = torch.tensor([0, *bits]).to(energies)
        left = energies[:, None] * energies.new_tensor([1.0, *(noises[b] for b in bits)])
        # Between the lambda that gives every component the most bits and the one that gives none any.
        slopes = energies / bits[0]
        low, high = slopes[slopes > 0].min().log2() - 8, slopes.max().log2() + 1
        for price in torch.logspace(float(high), float(low), STEPS, base=2.0):
            chosen = (left + price * widths).argmin(1)
            ranks = torch.bincount(chosen, minlength=len(widths)).tolist()
            terms = tuple((b, k) for b, k in zip(reversed(bits), reversed(ranks[1:]), strict=True) if k)
            if terms:
                kept = float(left.gather(1, chosen[:, None]).sum())
                out[terms] = min(kept + float(errors[rank]), out.get(terms, float("inf")))
    worth, least = list[tuple[Terms, float]](), float("inf")
    for terms, error in sorted(out.items(), key=lambda item: sum(b * k * size / 8 + TERM_BYTES for b, k in item[0])):
        if error < WORTH * least:  # than all that take fewer bytes
            worth, least = [*worth, (terms, error)], error
    return worth


def fit_terms(target: Tensor, metric: Metric, terms: Terms, group_size: int, dtype: torch.dtype) -> LinearMap:
    """Return the map of given terms, each fitted to what those before it left.

    Args:
        target: W (m, n).
        metric: what close means.
        terms: bits and rank of each.
        group_size: entries that share a scale.
        dtype: of scales.
    """
    rest, maps = target.double(), list[LinearMap]()
    for bits, rank in terms:
        factors = regress(rest, metric, rank=rank).factors(rank)
        if bits == HALF:
            maps.append(factors.to(torch.float16))
        else:
            maps.append(coded(factors, rest, metric, coding_of(bits, group_size), dtype))
        rest = rest - maps[-1].to(torch.float64).dense()
    return _sum(maps)


def blank_terms(shape: tuple[int, int], terms: Terms, group_size: int, dtype: torch.dtype) -> LinearMap:
    """Return what `fit_terms` makes on the meta device: its sizes without its numbers."""

    def blank(bits: int, rank: int) -> LinearMap:
        up, down = (torch.empty(s, dtype=torch.float16, device="meta") for s in ((shape[0], rank), (rank, shape[1])))
        return LowRank(up, down) if bits == HALF else coded_blank(LowRank(up, down), coding_of(bits, group_size), dtype)

    return _sum([blank(bits, rank) for bits, rank in terms])


def fit_full(target: Tensor, metric: Metric, bits: int, group_size: int, dtype: torch.dtype) -> LinearMap:
    """Return all of a matrix as codes."""
    return coded(Dense(target), target, metric, coding_of(bits, group_size), dtype)


def blank_full(shape: tuple[int, int], bits: int, group_size: int, dtype: torch.dtype) -> LinearMap:
    """Return what `fit_full` makes, on the meta device."""
    return coded_blank(Dense(torch.empty(shape, device="meta")), coding_of(bits, group_size), dtype)


def _sum(maps: Sequence[LinearMap]) -> LinearMap:
    return maps[0] if len(maps) == 1 else Sum(tuple(maps))
