"""The multi-choice knapsack: least predicted loss for the budget, over all layers and all their options.

After reducing every layer to the lower convex hull of (cost, loss), taking upgrades in order of loss saved per unit of
cost solves the linear relaxation; the integral solution is off by less than one upgrade (Sinha and Zoltners 1979).
"""

import heapq
from collections.abc import Sequence

from eckart.budget.candidates import NUMBERS, Candidates, Measure, Option, require_reachable


def knapsack(layers: Sequence[Candidates], budget: float, measure: Measure = NUMBERS) -> dict[str, Option]:
    """Choose one option per layer with least predicted loss in total.

    Args:
        layers: candidates; dense is one of the options of each.
        budget: what all layers may cost together.
        measure: what is counted.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    require_reachable(layers, budget, measure)
    chosen = {layer.name: hull(layer.options, measure)[0] for layer in layers}
    left = budget - sum(measure.of(option) for option in chosen.values())
    full: set[str] = set()
    for name, option in upgrades(layers, measure):
        step = measure.of(option) - measure.of(chosen[name])
        if name in full or step > left:
            full.add(name)  # no later upgrade of this layer saves more per cost; others may still fit
            continue
        left -= step
        chosen[name] = option
    return topped_up(layers, chosen, left, measure)


def upgrades(layers: Sequence[Candidates], measure: Measure = NUMBERS) -> list[tuple[str, Option]]:
    """Return all steps from one corner of a layer's hull to the next, those that save most loss per cost first.

    Args:
        layers: candidates.
        measure: what is counted.

    Returns:
        name of the layer and the option it goes to; the first option of every layer is where it starts.
    """
    hulls = [hull(layer.options, measure) for layer in layers]
    at = [0] * len(hulls)
    queue = [(-_slope(h[0], h[1], measure), i) for i, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(queue)
    out = []
    while queue:
        _, i = heapq.heappop(queue)
        at[i] += 1
        out.append((layers[i].name, hulls[i][at[i]]))
        if at[i] + 1 < len(hulls[i]):
            heapq.heappush(queue, (-_slope(hulls[i][at[i]], hulls[i][at[i] + 1], measure), i))
    return out


def hull(options: Sequence[Option], measure: Measure = NUMBERS) -> list[Option]:
    """Return the options on the lower convex hull of (cost, loss), by ascending cost and falling loss."""
    out: list[Option] = []
    for option in sorted(options, key=lambda o: (measure.of(o), o.loss)):
        if out and option.loss >= out[-1].loss:
            continue
        while len(out) > 1 and _slope(out[-2], out[-1], measure) <= _slope(out[-1], option, measure):
            out.pop()
        out.append(option)
    return out


def _slope(a: Option, b: Option, measure: Measure) -> float:
    """Return the loss saved per cost by going from a to b."""
    return (a.loss - b.loss) / (measure.of(b) - measure.of(a))


def topped_up(
    layers: Sequence[Candidates], chosen: dict[str, Option], left: float, measure: Measure
) -> dict[str, Option]:
    """Spend what the hulls left over on the best single upgrades to options between their corners."""
    for layer in sorted(layers, key=lambda c: -chosen[c.name].loss):
        now = chosen[layer.name]
        fits = [o for o in layer.options if 0 < measure.of(o) - measure.of(now) <= left and o.loss < now.loss]
        if fits:
            best = min(fits, key=lambda o: o.loss)
            left -= measure.of(best) - measure.of(now)
            chosen[layer.name] = best
    return chosen
