"""Allocators against brute force on small tables, and the promises all of them make."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eckart.budget import (
    BYTES,
    DENSE,
    FLOPS,
    NUMBERS,
    SECONDS,
    Candidates,
    Measure,
    Option,
    calibrated,
    candidates,
    knapsack,
    least_cost,
    probe_option,
    proportional,
    threshold,
    uniform,
    uniform_rank,
    weights_by_influence,
    weights_by_loss,
    zero_sum,
)
from eckart.budget.knapsack import hull
from eckart.budget.latency import Latencies, between, grid, rising
from eckart.errors import EckartError
from eckart.maps import storage


def by_position(layers: list[Candidates], budget: float, measure: Measure = NUMBERS) -> dict[str, Option]:
    """Removed shares 1 : 2 : 3 ..., the first layer's next to none."""
    return proportional(layers, budget, {c.name: i + 1e-12 for i, c in enumerate(layers)}, measure)


ALLOCATORS = {
    "knapsack": knapsack,
    "threshold": threshold,
    "uniform": uniform,
    "uniform-rank": uniform_rank,
    "proportional": by_position,
}


def layer(name: str, numbers: list[int], losses: list[float]) -> Candidates:
    """A layer whose last option is dense."""
    ranks = [*range(1, len(numbers)), 8]
    names = ["lowrank"] * (len(numbers) - 1) + [DENSE]
    options = zip(names, ranks, numbers, losses, strict=True)
    return Candidates(name, (8, 8), tuple(Option(s, r, n, 4 * n, x) for s, r, n, x in options))


@st.composite
def tables(draw, falling: bool = True) -> list[Candidates]:
    out = []
    for i in range(draw(st.integers(1, 4))):
        count = draw(st.integers(0, 4))
        numbers = sorted(draw(st.sets(st.integers(1, 40), min_size=count + 1, max_size=count + 1)))
        losses = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
        out.append(layer(f"l{i}", numbers, [*map(float, sorted(losses, reverse=True) if falling else losses), 0.0]))
    return out


def total(chosen: dict[str, Option]) -> int:
    return sum(option.numbers for option in chosen.values())


def loss(chosen: dict[str, Option]) -> float:
    return sum(option.loss for option in chosen.values())


def brute_force(layers: list[Candidates], budget: int) -> float:
    choices = itertools.product(*(c.options for c in layers))
    return min(sum(o.loss for o in choice) for choice in choices if sum(o.numbers for o in choice) <= budget)


def budgets(layers: list[Candidates]) -> range:
    return range(least_cost(layers), sum(c.dense.numbers for c in layers) + 2)


@given(tables(falling=False), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_never_over_budget_and_one_option_of_each_layer(name, layers, share):
    possible = budgets(layers)
    budget = possible[round(share * (len(possible) - 1))]
    chosen = ALLOCATORS[name](layers, budget)
    assert total(chosen) <= budget
    assert list(chosen) == [c.name for c in layers]
    assert all(chosen[c.name] in c.options for c in layers)


@given(tables(falling=False))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_refused_below_the_cheapest(name, layers):
    with pytest.raises(EckartError, match=r"cheapest options take .* parameters together, but the budget leaves them"):
        ALLOCATORS[name](layers, least_cost(layers) - 1)


@given(tables())
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_full_budget_costs_nothing(name, layers):
    chosen = ALLOCATORS[name](layers, sum(c.dense.numbers for c in layers))
    assert loss(chosen) == 0


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_full_budget_leaves_every_layer_dense(name):
    layers = [layer("a", [4, 9, 20], [3.0, 1.0, 0.0]), layer("b", [5, 12], [2.0, 0.0])]
    assert all(o.structure == DENSE for o in ALLOCATORS[name](layers, 32).values())


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_layer_without_structure_stays_dense(name):
    chosen = ALLOCATORS[name]([layer("only", [7], [0.0]), layer("b", [5, 12], [2.0, 0.0])], 12)
    assert (chosen["only"].structure, chosen["b"].structure) == (DENSE, "lowrank")


@given(tables(falling=False), st.floats(0, 1))
@settings(max_examples=500, deadline=None)
def test_knapsack_is_within_one_upgrade_of_the_optimum(layers, share):
    possible = budgets(layers)
    budget = possible[round(share * (len(possible) - 1))]
    best = brute_force(layers, budget)
    steps = [a.loss - b.loss for c in layers for a, b in itertools.pairwise(hull(c.options))]
    assert best - 1e-9 <= loss(knapsack(layers, budget)) <= best + max(steps, default=0.0)


@given(tables(falling=False))
@settings(max_examples=200, deadline=None)
def test_knapsack_is_optimal_at_the_corners_of_the_relaxation(layers):
    """Where the greedy upgrades use the budget up exactly, the relaxation is integral."""
    steps = [(a, b) for c in layers for a, b in itertools.pairwise(hull(c.options))]
    steps.sort(key=lambda s: -(s[0].loss - s[1].loss) / (s[1].numbers - s[0].numbers))
    budget = least_cost(layers)
    for a, b in steps:
        budget += b.numbers - a.numbers
        assert loss(knapsack(layers, budget)) == pytest.approx(brute_force(layers, budget), abs=1e-9)


@given(tables())
@settings(max_examples=200, deadline=None)
def test_hull_is_convex_and_below_every_option(layers):
    for c in layers:
        corners = hull(c.options)
        slopes = [(a.loss - b.loss) / (b.numbers - a.numbers) for a, b in itertools.pairwise(corners)]
        assert all(s > t for s, t in itertools.pairwise(slopes))
        assert all(s > 0 for s in slopes)
        for o in c.options:
            below = max((a for a in corners if a.numbers <= o.numbers), key=lambda a: a.numbers)
            above = min((a for a in corners if a.numbers >= o.numbers), key=lambda a: a.numbers, default=below)
            span = above.numbers - below.numbers
            share = (o.numbers - below.numbers) / span if span else 0.0
            assert below.loss + share * (above.loss - below.loss) <= o.loss + 1e-9


def test_knapsack_spends_where_it_helps_most():
    layers = [layer("steep", [10, 20], [100.0, 0.0]), layer("flat", [10, 20], [1.0, 0.0])]
    chosen = knapsack(layers, 30)
    assert (chosen["steep"].structure, chosen["flat"].structure) == (DENSE, "lowrank")


def test_knapsack_uses_what_the_hull_leaves_over():
    # The middle option is above the hull, but the only one that fits.
    chosen = knapsack([layer("a", [10, 15, 20], [10.0, 9.0, 0.0])], 17)
    assert chosen["a"].numbers == 15


def test_uniform_gives_equal_shares():
    losses = torch.linspace(1, 0, 65)
    shapes = {"square": (64, 64), "wide": (64, 192), "tall": (256, 64)}
    layers = [candidates(n, s, losses, storage("lowrank"), itemsize=4) for n, s in shapes.items()]
    budget = sum(c.dense.numbers for c in layers) // 2
    chosen = uniform(layers, budget)
    for c in layers:
        assert abs(chosen[c.name].numbers / c.dense.numbers - 0.5) < 0.04
    left = budget - total(chosen)
    assert all(c.options[c.options.index(chosen[c.name]) + 1].numbers - chosen[c.name].numbers > left for c in layers)


def test_uniform_rank_gives_equal_shares_of_full_rank():
    losses = torch.linspace(1, 0, 65)
    shapes = {"wide": (64, 192), "tall": (256, 64), "small": (32, 96)}
    layers = [candidates(n, s, losses[: min(s) + 1], storage("lowrank"), itemsize=4) for n, s in shapes.items()]
    chosen = uniform_rank(layers, sum(c.dense.numbers for c in layers) // 2)
    shares = [chosen[c.name].rank / min(c.shape) for c in layers]
    assert max(shares) - min(shares) <= 1 / 32
    square = candidates("square", (64, 64), losses, storage("lowrank"), itemsize=4)
    wide = candidates("wide", (64, 640), losses, storage("lowrank"), itemsize=4)
    both = uniform_rank([square, wide], square.dense.numbers + wide.dense.numbers * 6 // 10)
    assert both["square"].structure == DENSE  # two thirds of full rank would store more than the dense layer
    assert both["wide"].structure == "lowrank"


@given(tables(), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_threshold_takes_the_cheapest_below_one_score(layers, share):
    """No layer is above the lowest threshold that fits, and no layer's next lower score would fit any more."""
    possible = budgets(layers)
    budget = possible[round(share * (len(possible) - 1))]
    chosen = threshold(layers, budget)
    scores = sorted({o.loss for c in layers for o in c.options})

    def at(limit: float) -> dict[str, Option]:
        return {c.name: next((o for o in c.options if o.loss <= limit), c.dense) for c in layers}

    limit = min(s for s in scores if total(at(s)) <= budget)
    left = budget - total(chosen)
    assert left >= 0
    for c in layers:
        now = chosen[c.name]
        assert now.loss <= limit
        lower = next((o for o in c.options if o.loss < now.loss), None)
        assert lower is None or lower.numbers - now.numbers > left


def test_candidates_stop_where_dense_is_smaller():
    c = candidates("l", (8, 8), [float(8 - r) for r in range(9)], storage("lowrank"), itemsize=2, bias=8)
    assert [o.rank for o in c.options] == [1, 2, 3, 8]
    assert [o.numbers for o in c.options] == [24, 40, 56, 72]
    assert [o.nbytes for o in c.options] == [48, 80, 112, 144]
    assert [o.loss for o in c.options] == [7.0, 6.0, 5.0, 0.0]
    assert c.dense.structure == DENSE


def test_candidates_count_what_is_really_stored():
    losses = [0.0] * 13
    pivoted = candidates("l", (12, 20), losses, storage("pivoted"), itemsize=4)
    # never more numbers than dense, but at rank 11 the indices take more bytes than it saves
    assert [o.rank for o in pivoted.options] == [*range(1, 11), 12]
    assert pivoted.options[2].numbers == 3 * (12 + 20 - 3)
    assert pivoted.options[2].nbytes == 4 * pivoted.options[2].numbers + 4 * 12
    gained = candidates("l", (12, 20), losses, storage("lowrank"), itemsize=4, extra_bias=True)
    assert gained.options[0].numbers == 32 + 12
    assert gained.dense.numbers == 240


@pytest.mark.parametrize(
    ("round_to", "smallest", "ranks"), [(4, 1, [4, 8, 12]), (4, 5, [8, 12]), (1, 14, [14, 15]), (16, 1, [])]
)
def test_candidates_round_ranks(round_to, smallest, ranks):
    c = candidates("l", (32, 32), [0.0] * 33, storage("lowrank"), itemsize=4, round_to=round_to, smallest=smallest)
    assert [o.rank for o in c.options[:-1]] == ranks


def test_candidates_end_with_the_known_losses():
    c = candidates("l", (32, 32), [3.0, 2.0, 1.0], storage("lowrank"), itemsize=4)
    assert [o.rank for o in c.options] == [1, 2, 32]


def test_probe_is_the_largest_option_that_removes_its_share():
    c = layer("l", [50, 89, 90, 91, 100], [4.0, 3.0, 2.0, 1.0, 0.0])
    assert probe_option(c).numbers == 90
    assert probe_option(c, removed=0.5).numbers == 50
    assert probe_option(c, removed=0.6) is None
    assert probe_option(layer("l", [100], [0.0])) is None


def test_calibrated_meets_the_measurement_at_the_probe():
    layers = [layer("a", [50, 80, 100], [8.0, 2.0, 0.0]), layer("b", [40, 90, 100], [900.0, 300.0, 0.0])]
    a, b = calibrated(layers, {"a": 0.5, "b": 0.1})
    assert [o.loss for o in a.options] == [2.0, 0.5, 0.0]
    assert [o.loss for o in b.options] == pytest.approx([0.3, 0.1, 0.0])
    assert probe_option(a).loss == 0.5


def test_calibrated_never_predicts_a_gain():
    (a,) = calibrated([layer("a", [50, 100], [8.0, 0.0])], {"a": -0.01})
    assert [o.loss for o in a.options] == [0.0, 0.0]


def test_calibrated_puts_unmeasured_layers_on_the_same_scale():
    layers = [
        layer("a", [50, 80, 100], [8.0, 2.0, 0.0]),
        layer("b", [50, 80, 100], [8.0, 2.0, 0.0]),
        layer("c", [50, 80, 100], [8.0, 2.0, 0.0]),
        layer("unmeasured", [50, 80, 100], [8.0, 2.0, 0.0]),
        layer("no-probe", [95, 100], [8.0, 0.0]),
        layer("lossless-probe", [50, 80, 100], [8.0, 0.0, 0.0]),
    ]
    out = calibrated(layers, {"a": 0.2, "b": 0.4, "c": 40.0, "lossless-probe": 0.001})
    for c in out[3:]:
        assert c.options[0].loss == pytest.approx(8.0 * 0.2)  # the median factor, 0.4 / 2
    assert calibrated(layers, {}) == layers


def test_calibrated_weighs_early_blocks_more():
    layers = [layer(n, [50, 100], [1.0, 0.0]) for n in "abc"]
    depth = {"a": 0, "b": 1, "c": 2}
    out = calibrated(layers, dict.fromkeys("abc", 1.0), depth=depth, gamma=0.5, alpha=1.0)
    sums = [1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3]
    assert [c.options[0].loss for c in out] == pytest.approx([1 + 0.5 * s / sums[0] for s in sums])
    assert calibrated(layers, dict.fromkeys("abc", 1.0), depth=depth) == layers


def test_largest_rank_of_a_storage_fits():
    for name in ("lowrank", "pivoted"):
        stored = storage(name)
        for numbers in range(0, 700, 7):
            rank = stored.largest_rank((20, 30), numbers)
            assert stored.numbers((20, 30), rank) <= numbers
            assert rank == 20 or stored.numbers((20, 30), rank + 1) > numbers
    assert math.isfinite(storage("lowrank").numbers((1, 1), 1))


def timed(layers: list[Candidates], factor: float = 0.01) -> list[Candidates]:
    """The same layers with seconds in proportion to their numbers."""
    return [
        dataclasses.replace(
            c, options=tuple(dataclasses.replace(o, flops=2 * o.numbers, seconds=factor * o.numbers) for o in c.options)
        )
        for c in layers
    ]


@given(tables(falling=False), st.floats(0, 1), st.sampled_from([BYTES, FLOPS, SECONDS]))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_proportional_measure_chooses_the_same(name, layers, share, measure):
    possible = budgets(layers)
    budget = possible[round(share * (len(possible) - 1))]
    factor = {"nbytes": 4, "flops": 2, "seconds": 0.01}[measure.name]
    chosen = ALLOCATORS[name](timed(layers), factor * budget * (1 + 1e-9), measure)
    expected = ALLOCATORS[name](layers, budget)
    assert {n: o.numbers for n, o in chosen.items()} == {n: o.numbers for n, o in expected.items()}


def test_options_are_sorted_by_what_counts_and_none_costs_more_than_dense():
    slow, fast, even = (
        Option(n, 1, k, 4 * k, 1.0, seconds=s) for n, k, s in (("slow", 4, 3.0), ("fast", 6, 1.0), ("even", 5, 2.0))
    )
    dense = Option(DENSE, 8, 8, 32, 0.0, seconds=2.0)
    c = Candidates("l", (2, 4), (slow, even, fast, dense))
    assert c.by(SECONDS).options == (fast, dense)
    assert c.by(NUMBERS).options == (slow, even, fast, dense)
    with pytest.raises(EckartError, match="a budget over flops needs options that know theirs"):
        c.by(FLOPS)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_cleaned_times_rise_and_are_nearest(values):
    found = rising(values)
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values), abs=1e-9)
    assert rising(found) == pytest.approx(found)
    # the optimum of least squares over a convex cone: no step towards another member of the cone helps
    for other in ([min(values)] * len(values), sorted(values), [max(values)] * len(values)):
        assert sum((v - f) * (o - f) for v, f, o in zip(values, found, other, strict=True)) <= 1e-9


def test_times_between_measured_sizes_lie_on_lines():
    assert [between([2, 4, 8], [1.0, 2.0, 6.0], size) for size in (1, 2, 3, 4, 6, 8, 9)] == [1, 1, 1.5, 2, 4, 6, 6]
    assert between([3], [5.0], 7) == 5.0


@given(st.sets(st.integers(1, 500), max_size=60))
def test_few_sizes_are_measured_the_ends_among_them(sizes):
    found = grid(sorted(sizes))
    assert found == sorted(set(found))
    assert set(found) <= sizes
    assert len(found) <= 8
    if sizes:
        assert {min(sizes), max(sizes)} <= set(found)


def test_a_latency_table_is_measured_once(tmp_path):
    table, calls = Latencies(tmp_path, torch.device("cpu")), []

    def tasks():
        calls.append(1)
        return {"dense": lambda: sum(range(1000)), "small": lambda: sum(range(10))}

    first = table.seconds("sums", tasks)
    assert first["small"] < first["dense"]
    assert table.seconds("sums", tasks) == first
    assert len(calls) == 1
    table.seconds("other sums", tasks)
    assert len(calls) == 2


def finely(name: str) -> Candidates:
    """A layer of 1,000 numbers with an option for every one of them."""
    return layer(name, [*range(1, 1000), 1000], [float(1000 - i) for i in range(1, 1001)])


@given(st.lists(st.floats(0.2, 5), min_size=2, max_size=4), st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_removed_shares_are_proportional_until_a_layer_is_used_up(weights, kept):
    names = [f"l{i}" for i in range(len(weights))]
    budget = max(round(kept * 1000 * len(names)), len(names))
    chosen = proportional([finely(n) for n in names], budget, dict(zip(names, weights, strict=True)))
    removed = {n: 1 - chosen[n].numbers / 1000 for n in names}
    assert budget - len(names) <= total(chosen) <= budget
    ratios = [removed[n] / w for n, w in zip(names, weights, strict=True) if removed[n] < 0.998]
    assert max(ratios, default=0) - min(ratios, default=0) <= 0.004 / min(weights)


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e7), min_size=1))
@example({"b": 3.0, "c": 3_000_004.0})
@example({"a": 2.2e-311})
@example({"b": 1e-290, "c": 0.0, "d": 1e-289})
def test_weights_by_loss_are_those_of_the_paper_where_its_formula_is_defined(losses):
    groups = {name: "vowel" if name in "ae" else "consonant" for name in losses}
    weights = weights_by_loss(losses, groups)
    for group in set(groups.values()):
        names = [name for name in losses if groups[name] == group]
        assert sum(weights[n] for n in names) == pytest.approx(len(names))
        assert all(weights[n] > 0 for n in names)
        by_loss = sorted(names, key=lambda n: losses[n])
        assert all(weights[a] >= weights[b] - 1e-12 for a, b in itertools.pairwise(by_loss))
        if min(losses[n] for n in names) >= math.e:
            scores = {n: 1 / math.log(losses[n]) for n in names}
            for n in names:
                assert weights[n] == pytest.approx(len(names) * scores[n] / sum(scores.values()))


def scored(name: str, changes: list[float]) -> Candidates:
    """A layer of 8 x 8 whose values i = 0 ... 7 change the loss by that when dropped; 16 numbers per rank."""
    curve = [sum(changes[k:]) for k in range(9)]
    options = tuple(Option("lowrank", k, 16 * k, 64 * k, curve[k]) for k in (1, 2, 3))
    return Candidates(name, (8, 8), (*options, Option(DENSE, 8, 64, 256, 0.0)), tuple(curve))


def by_the_rule(changes: dict[str, list[float]], budget: int, least: int) -> dict[str, int]:
    """The paper's rule with a search instead of heaps; ranks above 3 are dense."""
    ranks, total = dict.fromkeys(changes, 8), 0.0
    while sum(64 if k > 3 else 16 * k for k in ranks.values()) > budget:
        tails = [(abs(changes[n][k - 1]), i, n) for i, (n, k) in enumerate(ranks.items()) if k > least]
        if not tails:
            least = 1
            continue
        preferred = [t for t in tails if (changes[t[2]][ranks[t[2]] - 1] >= 0) == (total <= 0)]
        _, _, name = min(preferred or tails)
        total += changes[name][ranks[name] - 1]
        ranks[name] -= 1
    return ranks


@given(
    st.lists(st.lists(st.integers(-50, 50), min_size=8, max_size=8), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.4, 0.9]),
)
@settings(max_examples=200, deadline=None)
def test_zero_sum_follows_the_rule(lists, share, floor):
    changes = {f"l{i}": list(map(float, values)) for i, values in enumerate(lists)}
    layers = [scored(name, values) for name, values in changes.items()]
    budget = round(len(layers) * (16 + share * 48))
    chosen = zero_sum(layers, budget, floor)
    expected = by_the_rule(changes, budget, max(1, math.ceil(3 * floor)))
    assert total(chosen) <= budget
    assert {n: o.rank for n, o in chosen.items()} == {n: k if k <= 3 else 8 for n, k in expected.items()}


def test_zero_sum_leaves_layers_without_a_curve_alone():
    chosen = zero_sum([scored("a", [1.0] * 8), layer("b", [5, 12], [2.0, 0.0])], 60)
    assert (chosen["a"].rank, chosen["b"].structure) == (3, DENSE)
    with pytest.raises(EckartError, match="cheapest options"):
        zero_sum([scored("a", [1.0] * 8)], 15)


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=6), st.floats(0.01, 10))
def test_weights_by_influence_are_a_softmax_with_mean_one(influence, temperature):
    weights = torch.tensor(weights_by_influence(influence, temperature), dtype=torch.float64)
    expected = len(influence) * (-torch.tensor(influence, dtype=torch.float64) / temperature).softmax(0)
    torch.testing.assert_close(weights, expected)
