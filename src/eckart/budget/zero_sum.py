"""Zero-sum truncation: singular values are dropped one by one, so that the predicted changes of the loss cancel.

    of every layer's smallest value left, drop the one of least |change| among those whose change has the sign opposite
    to the sum so far (of the other sign, where there is none), until the budget is met

Source: Abbasi et al. 2026, "Zero Sum SVD", section 3, with two heaps by sign as in mint-vu/Zero-Sum-SVD.
"""

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from eckart.budget.candidates import NUMBERS, Candidates, Option, require_reachable


@dataclass(slots=True)
class _State:
    """A layer on its way down: the rank left, and the least rank it may have."""

    layer: Candidates
    ranks: list[int]
    rank: int
    least: int

    def option(self) -> Option:
        """Return the smallest option that has the rank; dense above the break-even."""
        return self.layer.options[bisect.bisect_left(self.ranks, self.rank)]

    def change(self) -> float:
        """Return the predicted change of dropping the next value."""
        return self.layer.curve[self.rank - 1] - self.layer.curve[self.rank]


def zero_sum(layers: Sequence[Candidates], budget: float, floor: float = 0.0) -> dict[str, Option]:
    """Drop singular values until the layers fit the budget; layers that end above their break-even rank stay dense.

    Args:
        layers: candidates whose curves are predicted changes of the loss, of either sign, by rank.
        budget: numbers all layers may store together.
        floor: share of the break-even rank below which no layer is truncated while others can be.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    require_reachable(layers, budget, NUMBERS)
    states = []
    for layer in layers:
        ranks = [option.rank for option in layer.options[:-1]]
        if ranks and layer.curve:
            least = max(ranks[0], math.ceil(floor * ranks[-1]))
            states.append(_State(layer, ranks, len(layer.curve) - 1, least))
    left = sum(layer.dense.numbers for layer in layers) - budget
    left, total = _drop(states, left, 0.0)
    if left > 0:
        for state in states:
            state.least = state.layer.options[0].rank
        _drop(states, left, total)
    chosen = {state.layer.name: state.option() for state in states}
    return {layer.name: chosen.get(layer.name, layer.dense) for layer in layers}


def _drop(states: Sequence[_State], left: float, total: float) -> tuple[float, float]:
    """Drop values until `left` numbers are saved or none may go; return what is left to save and the sum of changes."""
    heaps: dict[bool, list[tuple[float, int]]] = {True: [], False: []}  # by whether the change is positive

    def push(i: int) -> None:
        if states[i].rank > states[i].least:
            change = states[i].change()
            heapq.heappush(heaps[change >= 0], (abs(change), i))

    for i in range(len(states)):
        push(i)
    while left > 0 and (heaps[True] or heaps[False]):
        preferred = total <= 0
        _, i = heapq.heappop(heaps[preferred] or heaps[not preferred])
        state, before = states[i], states[i].option().numbers
        total += state.change()
        state.rank -= 1
        left -= before - state.option().numbers
        push(i)
    return left, total
