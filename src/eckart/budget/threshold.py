"""One global threshold: every layer takes its cheapest option whose score is not above it.

WeLore applies it to min-max normalized singular values, ASVD to the perplexity measured with one layer truncated.
"""

from collections.abc import Sequence

from eckart.budget.candidates import Candidates, Option, require_reachable


def threshold(layers: Sequence[Candidates], budget: int) -> dict[str, Option]:
    """Choose by the smallest threshold that fits the budget, then relax single layers while they fit.

    Args:
        layers: candidates whose losses are the scores; dense has score 0 and is taken where nothing else qualifies.
        budget: numbers all layers may store together.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    require_reachable(layers, budget)
    values = sorted({o.loss for layer in layers for o in layer.options})
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if _numbers(layers, values[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    chosen = {layer.name: _cheapest(layer, values[high]) for layer in layers}
    left = budget - sum(o.numbers for o in chosen.values())
    if high > 0:  # options just below the threshold, as far as the rounding of the threshold left room
        for layer in layers:
            better = _cheapest(layer, values[high - 1])
            if better.numbers - chosen[layer.name].numbers <= left:
                left -= better.numbers - chosen[layer.name].numbers
                chosen[layer.name] = better
    return chosen


def _cheapest(layer: Candidates, limit: float) -> Option:
    return next((o for o in layer.options if o.loss <= limit), layer.dense)


def _numbers(layers: Sequence[Candidates], limit: float) -> int:
    return sum(_cheapest(layer, limit).numbers for layer in layers)
