"""Removed shares in given proportions: what a closed-form importance says of every layer, scaled to meet the budget.

    r_i = R w_i,    R such that the budget is met

SVD-LLM v2 has w_i = |group| s_i / sum of s_j over the group of matrices of one type, s_i = 1 / log L_i; MoDeGPT has
w_i = softmax(-BI_i / epsilon) over the blocks, times their number.
"""

import math
from collections.abc import Mapping, Sequence

from eckart.budget.candidates import NUMBERS, Candidates, Measure, Option, require_reachable
from eckart.budget.uniform import filled, largest_share, within

# Losses below this share of the largest in their group count as that: the logarithm of none is minus infinity.
SMALLEST_LOSS = 1e-6
# Where the largest is below this, a group has lost nothing: smaller shares of it are no normal numbers.
NO_LOSS = 1e-290
# A layer of no weight would never be touched, even if the others alone cannot meet the budget.
SMALLEST_WEIGHT = 1e-6


def proportional(
    layers: Sequence[Candidates], budget: float, weights: Mapping[str, float], measure: Measure = NUMBERS
) -> dict[str, Option]:
    """Remove a share of every layer's cost in proportion to its weight; what rounding leaves is spent as in
    `uniform`. Shares that no option reaches are cut off, and the other layers' rise.

    Args:
        layers: candidates.
        budget: what all layers may cost together.
        weights: how much is removed of each layer, relative to the others, by name; positive.
        measure: what is counted; options ascend in it.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    require_reachable(layers, budget, measure)
    largest = max(weights.values())
    each = [max(weights[layer.name] / largest, SMALLEST_WEIGHT) for layer in layers]

    def kept(amount: float) -> list[float]:
        removed = (1 - amount) / min(each)  # amount = 1 removes nothing, 0 all there is of every layer
        return [max(1 - removed * weight, 0.0) for weight in each]

    shares = kept(largest_share(lambda amount: within(layers, kept(amount), measure), layers, budget, measure))
    return filled(layers, within(layers, shares, measure), shares, budget, measure)


def weights_by_influence(influence: Sequence[float], temperature: float) -> list[float]:
    """Return the weights of MoDeGPT: softmax(-BI / epsilon) over the blocks, times their number.

    Args:
        influence: BI of every block, 1 - E cos(x, y) of its input and output.
        temperature: epsilon, positive; the larger, the more even.

    Source: Lin et al. 2024, "MoDeGPT", section 3.3: the optimum of sum BI (1 - r) + epsilon H(r) at a given mean.
    """
    least = min(influence)
    scores = [math.exp((least - value) / temperature) for value in influence]
    return [len(scores) * score / sum(scores) for score in scores]


def weights_by_loss(losses: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """Return the weights of SVD-LLM v2: 1 / log L, with mean one in every group.

    The formula needs L > 1, which a norm over few vectors or of small outputs need not have. A group with a smaller L
    than e is rescaled so that its smallest is e (and its weight before normalization 1); others are taken as they are.

    Args:
        losses: L, the norm of the output's error at the target, over all calibration vectors, by layer.
        groups: the group of each layer.

    Source: Wang et al. 2025, "SVD-LLM V2", section 3.1 and Algorithm 1.
    """
    members: dict[str, list[str]] = {}
    for name in losses:
        members.setdefault(groups[name], []).append(name)
    out = {}
    for names in members.values():
        largest = max(losses[name] for name in names)
        least = min(SMALLEST_LOSS * largest, math.e)  # a loss for which the formula holds is taken as it is
        values = [max(losses[name], least) if largest > NO_LOSS else math.e for name in names]
        shift = max(0.0, 1 - math.log(min(values)))
        scores = [1 / (math.log(value) + shift) for value in values]
        out.update({name: len(names) * s / sum(scores) for name, s in zip(names, scores, strict=True)})
    return out
