"""The multi-choice knapsack: least predicted loss for the budget, over all layers and all their options.

After reducing every layer to the lower convex hull of (numbers, loss), taking upgrades in order of loss saved per
number solves the linear relaxation; the integral solution is off by less than one upgrade (Sinha and Zoltners 1979).
"""

import heapq
from collections.abc import Sequence

from eckart.budget.candidates import Candidates, Option, require_reachable


def knapsack(layers: Sequence[Candidates], budget: int) -> dict[str, Option]:
    """Choose one option per layer with least predicted loss in total.

    Args:
        layers: candidates; dense is one of the options of each.
        budget: numbers all layers may store together.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    require_reachable(layers, budget)
    chosen = {layer.name: hull(layer.options)[0] for layer in layers}
    left = budget - sum(option.numbers for option in chosen.values())
    full: set[str] = set()
    for name, option in upgrades(layers):
        step = option.numbers - chosen[name].numbers
        if name in full or step > left:
            full.add(name)  # no later upgrade of this layer saves more per number; others may still fit
            continue
        left -= step
        chosen[name] = option
    return _filled(layers, chosen, left)


def upgrades(layers: Sequence[Candidates]) -> list[tuple[str, Option]]:
    """Return all steps from one corner of a layer's hull to the next, those that save most loss per number first.

    Args:
        layers: candidates.

    Returns:
        name of the layer and the option it goes to; the first option of every layer is where it starts.
    """
    hulls = [hull(layer.options) for layer in layers]
    at = [0] * len(hulls)
    queue = [(-_slope(h[0], h[1]), i) for i, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(queue)
    out = []
    while queue:
        _, i = heapq.heappop(queue)
        at[i] += 1
        out.append((layers[i].name, hulls[i][at[i]]))
        if at[i] + 1 < len(hulls[i]):
            heapq.heappush(queue, (-_slope(hulls[i][at[i]], hulls[i][at[i] + 1]), i))
    return out


def hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of (numbers, loss), by ascending numbers and falling loss."""
    out: list[Option] = []
    for option in sorted(options, key=lambda o: (o.numbers, o.loss)):
        if out and option.loss >= out[-1].loss:
            continue
        while len(out) > 1 and _slope(out[-2], out[-1]) <= _slope(out[-1], option):
            out.pop()
        out.append(option)
    return out


def _slope(a: Option, b: Option) -> float:
    """Return the loss saved per number by going from a to b."""
    return (a.loss - b.loss) / (b.numbers - a.numbers)


def _filled(layers: Sequence[Candidates], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """Spend what the hulls left over on the best single upgrades to options between their corners."""
    for layer in sorted(layers, key=lambda c: -chosen[c.name].loss):
        now = chosen[layer.name]
        fits = [o for o in layer.options if 0 < o.numbers - now.numbers <= left and o.loss < now.loss]
        if fits:
            best = min(fits, key=lambda o: o.loss)
            left -= best.numbers - now.numbers
            chosen[layer.name] = best
    return chosen
