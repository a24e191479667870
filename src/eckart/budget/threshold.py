"""One global threshold: every layer takes its cheapest option whose score is not above it.

WeLore applies it to min-max normalized singular values, ASVD to the perplexity measured with one layer truncated.
"""

import heapq
from collections.abc import Sequence

from eckart.budget.candidates import NUMBERS, Candidates, Measure, Option, require_reachable


def threshold(layers: Sequence[Candidates], budget: float, measure: Measure = NUMBERS) -> dict[str, Option]:
    """Choose by the smallest threshold that fits the budget, then relax single layers while they fit.

    Args:
        layers: candidates whose losses are the scores; dense has score 0 and is taken where nothing else qualifies.
        budget: what all layers may cost together.
        measure: what is counted; options ascend in it.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    require_reachable(layers, budget, measure)
    values = sorted({o.loss for layer in layers for o in layer.options})
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if _cost(layers, values[middle], measure) <= budget:
            high = middle
        else:
            low = middle + 1
    chosen = {layer.name: _cheapest(layer, values[high]) for layer in layers}
    return _relaxed(layers, chosen, budget - sum(map(measure.of, chosen.values())), measure)


def _relaxed(
    layers: Sequence[Candidates], chosen: dict[str, Option], left: float, measure: Measure
) -> dict[str, Option]:
    """Lower the threshold further for the layers for which that still fits: in discrete steps, one limit for all would
    leave a part of the budget unused.
    """
    by_name = {layer.name: layer for layer in layers}
    queue = [(-option.loss, i, name) for i, (name, option) in enumerate(chosen.items())]
    heapq.heapify(queue)
    while queue:
        _, i, name = heapq.heappop(queue)
        now = chosen[name]
        better = next((o for o in by_name[name].options if o.loss < now.loss), None)
        if better is not None and measure.of(better) - measure.of(now) <= left:
            left -= measure.of(better) - measure.of(now)
            chosen[name] = better
            heapq.heappush(queue, (-better.loss, i, name))
    return chosen


def _cheapest(layer: Candidates, limit: float) -> Option:
    return next((o for o in layer.options if o.loss <= limit), layer.dense)


def _cost(layers: Sequence[Candidates], limit: float, measure: Measure) -> float:
    return sum(measure.of(_cheapest(layer, limit)) for layer in layers)
