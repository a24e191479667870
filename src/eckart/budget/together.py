"""The knapsack where some layers may change together instead of each for itself: an MLP that gets fewer hidden units.

A set of layers costs, and loses, what its members do at the corners of the sum of their hulls, which are their upgrades
in order of loss saved per cost; or what they do together. All of that has one lower convex hull, so that the knapsack
over sets and single layers is again off by less than one upgrade.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eckart.budget.candidates import NUMBERS, Candidates, Measure, Option, least_cost
from eckart.budget.knapsack import hull, knapsack, topped_up, upgrades

EACH = "each for itself"


@dataclass(frozen=True, slots=True)
class Together:
    """Layers that may change together.

    Attributes:
        name: that of one of them, under which the choice stands.
        members: names of all.
        options: what they may become together, with costs and losses of all; "leave dense" is not among them.
    """

    name: str
    members: tuple[str, ...]
    options: tuple[Option, ...]


def knapsack_together(
    layers: Sequence[Candidates], sets: Sequence[Together], budget: float, measure: Measure = NUMBERS
) -> dict[str, Option]:
    """Choose one option per layer, or per set of layers, with least predicted loss in total.

    Args:
        layers: candidates of every layer, members of sets included.
        sets: which of them may change together; no layer is in two sets.
        budget: what all layers may cost together.
        measure: what is counted.

    Returns:
        the option by layer; of a set that changes together under its name, without its other members.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    known, members = {layer.name: layer for layer in layers}, {name for one in sets for name in one.members}
    corners = {one.name: _corners([known[name] for name in one.members], measure) for one in sets}
    table = [layer for layer in layers if layer.name not in members]
    found = knapsack([*table, *(_as_one(one, corners[one.name], measure) for one in sets)], budget, measure)
    chosen = {layer.name: found[layer.name] for layer in table}
    for one in sets:
        option = found[one.name]
        if option.structure == EACH:
            chosen |= corners[one.name][option.rank]
            table += [known[name] for name in one.members]
        else:
            chosen[one.name] = option
            table.append(Candidates(one.name, known[one.name].shape, one.options))
    left = budget - sum(measure.of(option) for option in chosen.values())
    chosen = topped_up(table, chosen, left, measure)
    if least_cost(layers, measure) > budget:
        return chosen
    return min((knapsack(layers, budget, measure), chosen), key=lambda c: sum(option.loss for option in c.values()))


def least_cost_together(layers: Sequence[Candidates], sets: Sequence[Together], measure: Measure = NUMBERS) -> float:
    """Return what the cheapest choice for every layer, or set of layers, costs together."""
    known, total = {layer.name: layer for layer in layers}, least_cost(layers, measure)
    for one in sets:
        apart = least_cost([known[name] for name in one.members], measure)
        total += min([0.0, *(measure.of(option) - apart for option in one.options)])
    return total


def _corners(members: Sequence[Candidates], measure: Measure) -> list[dict[str, Option]]:
    """Return the options of all members at the corners of the sum of their hulls, by ascending cost."""
    out = [{layer.name: hull(layer.options, measure)[0] for layer in members}]
    for name, option in upgrades(members, measure):
        out.append(out[-1] | {name: option})
    return out


def _as_one(one: Together, corners: Sequence[dict[str, Option]], measure: Measure) -> Candidates:
    """Return the options of a set: together, or each for itself, with the number of the corner as the rank."""
    apart = [_sum(at, list(corner.values())) for at, corner in enumerate(corners)]
    return Candidates(one.name, (0, 0), tuple(sorted((*one.options, *apart), key=measure.of)))


def _sum(rank: int, options: Sequence[Option]) -> Option:
    """Return what several options cost and lose together."""
    numbers, nbytes = sum(o.numbers for o in options), sum(o.nbytes for o in options)
    flops, seconds = (_total(values) for values in ([o.flops for o in options], [o.seconds for o in options]))
    return Option(EACH, rank, numbers, nbytes, sum(o.loss for o in options), flops, seconds)


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
