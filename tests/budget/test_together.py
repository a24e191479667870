"""The knapsack with sets of layers that may change together, against brute force over everything that may be chosen."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.budget import (
    DENSE,
    FLOPS,
    Candidates,
    Option,
    Together,
    knapsack,
    knapsack_together,
    least_cost,
    least_cost_together,
)
from eckart.budget.knapsack import hull
from eckart.errors import EckartError

Instance = tuple[list[Candidates], list[Together]]


@st.composite
def instances(draw) -> Instance:
    """Up to five layers, the first two or three of which may change together, and perhaps the others as well."""
    layers = []
    for i in range(draw(st.integers(2, 5))):
        count = draw(st.integers(0, 3))
        numbers = sorted(draw(st.sets(st.integers(1, 30), min_size=count + 1, max_size=count + 1)))
        losses = [*draw(st.lists(st.integers(1, 30), min_size=count, max_size=count)), 0]
        kinds = ["sparse"] * count + [DENSE]
        options = (Option(kind, 1, n, 4 * n, float(x)) for kind, n, x in zip(kinds, numbers, losses, strict=True))
        layers.append(Candidates(f"l{i}", (8, 8), tuple(options)))
    cut = draw(st.integers(2, min(3, len(layers))))
    sets = []
    for members in (layers[:cut], layers[cut:]):
        if len(members) < 2 or not draw(st.booleans() if sets else st.just(True)):
            continue
        dense = sum(layer.dense.numbers for layer in members)
        numbers = sorted(draw(st.sets(st.integers(1, dense), max_size=4)) - {dense})
        losses = draw(st.lists(st.integers(1, 60), min_size=len(numbers), max_size=len(numbers)))
        options = tuple(
            Option("neurons", 1 + i, n, 4 * n, float(x)) for i, (n, x) in enumerate(zip(numbers, losses, strict=True))
        )
        sets.append(Together(members[-1].name, tuple(layer.name for layer in members), options))
    return layers, sets


def choices(layers: list[Candidates], sets: list[Together]) -> list[list[tuple[int, float]]]:
    """Return the (numbers, loss) of everything that each set, and each layer in none, may become."""
    known = {layer.name: layer for layer in layers}
    grouped = {name for one in sets for name in one.members}
    out = [[(o.numbers, o.loss) for o in layer.options] for layer in layers if layer.name not in grouped]
    for one in sets:
        apart = itertools.product(*(known[name].options for name in one.members))
        out.append([(sum(o.numbers for o in several), sum(o.loss for o in several)) for several in apart])
        out[-1] += [(o.numbers, o.loss) for o in one.options]
    return out


def brute_force(layers: list[Candidates], sets: list[Together], budget: int) -> float:
    # Step by step, the least loss for every cost: the product of all choices would be too long.
    best = {0: 0.0}
    for several in choices(layers, sets):
        found: dict[int, float] = {}
        for (cost, lost), (numbers, loss) in itertools.product(best.items(), several):
            if cost + numbers <= budget:
                found[cost + numbers] = min(found.get(cost + numbers, float("inf")), lost + loss)
        best = found
    return min(best.values())


def loss(chosen: dict[str, Option]) -> float:
    return sum(option.loss for option in chosen.values())


@given(instances(), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_within_one_upgrade_of_the_optimum_and_never_worse_than_without_sets(instance, share):
    layers, sets = instance
    least, most = least_cost_together(layers, sets), sum(layer.dense.numbers for layer in layers)
    budget = least + round(share * (most - least))
    chosen = knapsack_together(layers, sets, budget)
    assert sum(option.numbers for option in chosen.values()) <= budget
    together = {one.name: one for one in sets if chosen[one.name].structure == "neurons"}
    taken = {name for one in together.values() for name in one.members} - together.keys()
    assert chosen.keys() == {layer.name for layer in layers} - taken
    for layer in layers:
        if layer.name in chosen:
            options = together[layer.name].options if layer.name in together else layer.options
            assert chosen[layer.name] in options
    best = brute_force(layers, sets, budget)
    hulls = [hull([Option("", 0, n, n, x) for n, x in several]) for several in choices(layers, sets)]
    steps = [a.loss - b.loss for corners in hulls for a, b in itertools.pairwise(corners)]
    assert best - 1e-9 <= loss(chosen) <= best + max(steps, default=0.0) + 1e-9
    if budget >= least_cost(layers):
        assert loss(chosen) <= loss(knapsack(layers, budget)) + 1e-9


@given(instances())
@settings(max_examples=100, deadline=None)
def test_refused_below_the_cheapest(instance):
    layers, sets = instance
    least = sum(min(numbers for numbers, _ in several) for several in choices(layers, sets))
    assert least_cost_together(layers, sets) == least
    with pytest.raises(EckartError, match="cheapest options take"):
        knapsack_together(layers, sets, least - 1)


@given(instances(), st.floats(0.003, 30))
@settings(max_examples=300, deadline=None)
def test_optimal_where_the_relaxation_is_integral(instance, price):
    """What minimises loss plus price times cost is optimal for what it costs (Everett 1963)."""
    layers, sets = instance
    price += 1e-6 * 2**0.5  # no two choices are equally good
    several = [min(options, key=lambda o: o[1] + price * o[0]) for options in choices(layers, sets)]
    budget = sum(numbers for numbers, _ in several)
    expected = sum(lost for _, lost in several)
    assert brute_force(layers, sets, budget) == pytest.approx(expected, abs=1e-9)
    assert loss(knapsack_together(layers, sets, budget)) == pytest.approx(expected, abs=1e-9)


def test_a_set_changes_together_only_where_that_loses_less():
    pair = [Candidates(n, (8, 8), (Option("sparse", 1, 4, 16, 6.0), Option(DENSE, 8, 10, 40, 0.0))) for n in "ab"]
    cheap, dear = (Together("b", ("a", "b"), (Option("neurons", 3, 9, 36, lost),)) for lost in (5.0, 20.0))
    assert knapsack_together(pair, [cheap], 10) == {"b": cheap.options[0]}
    assert knapsack_together(pair, [dear], 10) == {layer.name: layer.options[0] for layer in pair}
    assert all(option.structure == DENSE for option in knapsack_together(pair, [cheap], 20).values())


def test_a_set_is_held_to_other_budgets_too():
    dense = Option(DENSE, 8, 10, 40, 0.0, flops=20.0)
    pair = [Candidates(n, (8, 8), (Option("sparse", 1, 4, 16, 6.0, flops=19.0), dense)) for n in "ab"]
    one = Together("b", ("a", "b"), (Option("neurons", 3, 15, 60, 9.0, flops=10.0),))
    assert knapsack_together(pair, [one], 38.5, FLOPS) == {"b": one.options[0]}
