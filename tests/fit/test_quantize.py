"""Rounding to codes, held to brute force: scales, k-means, error feedback, and their bytes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from eckart.errors import EckartError
from eckart.fit.quantize import (
    Coding,
    Grid,
    blank_quantized,
    feedback,
    kmeans_rows,
    level_error,
    nearest_level,
    quantize,
)

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def correlated(n: int, seed: int = 0) -> torch.Tensor:
    """The second moment of inputs that a few directions dominate."""
    mix = normal(n, n, seed=seed) * torch.logspace(0, -2, n, dtype=F64)
    return mix @ mix.mT / n


def error(weight: torch.Tensor, rounded: torch.Tensor, second: torch.Tensor) -> float:
    change = weight - rounded
    return float(((change @ second) * change).sum())


@given(st.integers(1, 6), st.integers(1, 20), st.sampled_from([2, 3, 4, 8]), st.integers(1, 24), st.integers(0, 99))
def test_round_to_nearest_is_within_half_a_step_of_every_entry(m, n, bits, group, seed):
    weight = normal(m, n, seed=seed)
    coding = Coding(bits, group, rounding="nearest", clip=False)
    map_ = quantize(weight, coding, dtype=F64)
    turned = weight if map_.axis == "rows" else weight.mT
    steps = torch.stack([t.amax(1) - t.amin(1) for t in turned.split(group, dim=1)], 1) / (2**bits - 1)
    torch.testing.assert_close(map_.scale, steps)
    allowed = steps.repeat_interleave(group, 1)[:, : turned.shape[1]] * 0.5 + 1e-12
    rounded = map_.dense() if map_.axis == "rows" else map_.dense().mT
    assert bool(((turned - rounded).abs() <= allowed).all())


@given(st.integers(1, 5), st.integers(1, 30), st.sampled_from([2, 3, 4]), st.booleans(), st.integers(0, 99))
def test_the_search_over_scales_is_never_worse_than_the_extremes(m, n, bits, symmetric, seed):
    weight, diagonal = normal(m, n, seed=seed) ** 3, normal(n, seed=seed + 1) ** 2
    found = []
    for clip in (False, True):
        coding = Coding(bits, 8, rounding="nearest", symmetric=symmetric, clip=clip)
        map_ = quantize(weight, coding, diagonal, dtype=F64)
        assert (map_.zero is None) == symmetric
        found.append(error(weight, map_.dense(), torch.diag(diagonal)))
    assert found[1] <= found[0] * (1 + 1e-9) + 1e-15


def test_the_search_helps_where_there_are_outliers():
    weight = normal(8, 64)
    weight[:, 5] *= 6
    nearest, clipped = (
        error(weight, quantize(weight, Coding(3, 64, "nearest", clip=clip), dtype=F64).dense(), torch.eye(64).double())
        for clip in (False, True)
    )
    assert clipped < 0.9 * nearest


def test_codes_are_chosen_for_the_scales_as_stored():
    weight = normal(5, 40)
    map_ = quantize(weight, Coding(8, 16, rounding="nearest", clip=False), dtype=torch.float16)
    assert map_.dtype == torch.float16
    exact = map_.to(F64)
    step = exact.scale.repeat_interleave(16, 1)[:, :40]
    # Scales rounded down leave the extremes a little outside; nothing else is further away than half a step.
    assert float(((weight - exact.dense()).abs() / step).quantile(0.95)) <= 0.5


@given(st.integers(1, 4), st.integers(1, 25), st.sampled_from([2, 3, 4]), st.integers(0, 99))
def test_learned_levels_are_never_worse_than_whole_numbers(m, n, bits, seed):
    weight, diagonal = normal(m, n, seed=seed), normal(n, seed=seed + 1) ** 2
    found = []
    for levels in ("uniform", "learned"):
        map_ = quantize(weight, Coding(bits, 8, "nearest", levels, clip=False), diagonal, dtype=F64)
        found.append(error(weight, map_.dense(), torch.diag(diagonal)))
    assert found[1] <= found[0] * (1 + 1e-9) + 1e-15


@given(st.integers(2, 9), st.integers(0, 200))
def test_kmeans_never_raises_the_error_and_stays_ascending(n, seed):
    values, weights = normal(3, n, seed=seed), normal(3, n, seed=seed + 1) ** 2
    levels = normal(3, 4, seed=seed + 2).sort(dim=1).values
    before = level_error(values, weights, levels)
    for _ in range(5):
        levels = kmeans_rows(values, weights, levels, rounds=1)
        after = level_error(values, weights, levels)
        assert bool((after <= before + 1e-12).all())
        assert bool((levels.diff(dim=1) >= 0).all())
        before = after


def optimum(values: torch.Tensor, weights: torch.Tensor, count: int) -> float:
    """The least error of any levels: in one dimension clusters are intervals, so all cuts are tried."""
    at = values.argsort()
    v, w = values[at], weights[at]

    def one(a: int, b: int) -> float:
        mean = (w[a:b] * v[a:b]).sum() / w[a:b].sum()
        return float((w[a:b] * (v[a:b] - mean) ** 2).sum())

    n = len(v)
    cuts = itertools.combinations(range(1, n), count - 1)
    return min(sum(one(a, b) for a, b in itertools.pairwise((0, *cut, n))) for cut in cuts)


def test_learned_levels_are_near_the_optimum_of_all_cuts():
    total, best = 0.0, 0.0
    for seed in range(12):
        weight, diagonal = normal(1, 12, seed=seed), normal(12, seed=seed + 50) ** 2
        map_ = quantize(weight, Coding(2, 12, "nearest", "learned", clip=False), diagonal, dtype=F64)
        total += error(weight, map_.dense(), torch.diag(diagonal))
        best += optimum(weight[0], diagonal, 4)
    assert best <= total <= 1.5 * best


def test_kmeans_agrees_with_scikit_learn():
    values, weights = normal(4, 300), normal(4, 300, seed=1) ** 2
    starts = torch.linspace(-2, 2, 16, dtype=F64).expand(4, -1).contiguous()
    ours = kmeans_rows(values, weights, starts, rounds=300)
    for row in range(4):
        theirs = KMeans(16, init=starts[row, :, None].numpy(), n_init=1, tol=0).fit(
            values[row, :, None].numpy(), sample_weight=weights[row].numpy()
        )
        expected = torch.from_numpy(theirs.cluster_centers_[:, 0]).sort().values
        torch.testing.assert_close(ours[row], expected, atol=1e-8, rtol=0)


def test_nearest_level_is_the_nearest():
    values, levels = normal(3, 20), normal(3, 8, seed=1).sort(dim=1).values
    expected = (values[:, :, None] - levels[:, None]).abs().argmin(2)
    assert torch.equal(nearest_level(values, levels), expected)


def by_least_squares(weight: torch.Tensor, grid: Grid, moment: torch.Tensor) -> torch.Tensor:
    """Error feedback as it is meant: after every column, the later ones are refitted to the errors of all before."""
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    codes, now = torch.empty(weight.shape, dtype=torch.int64), weight.clone()
    rounded = weight.clone()
    for at, j in enumerate(order):
        codes[:, j], rounded[:, j] = grid.column(j, now[:, j])
        done, later = order[: at + 1], order[at + 1 :]
        if later:
            change = weight[:, done] - rounded[:, done]
            refit = moment[done][:, later] @ torch.linalg.inv(moment[later][:, later])
            now[:, later] = weight[:, later] + change @ refit
    return codes


@pytest.mark.parametrize("levels", ["uniform", "learned"])
@pytest.mark.parametrize("shape", [(3, 9), (5, 150)])
def test_feedback_is_least_squares_of_the_later_columns(shape, levels):
    weight, moment = normal(*shape), correlated(shape[1]) + 0.01 * torch.eye(shape[1], dtype=F64)
    spread = (weight.amax(1, True) - weight.amin(1, True)).expand(shape) / 7
    table = None if levels == "uniform" else normal(shape[0], 8, seed=3).sort(dim=1).values * 2
    grid = Grid(spread, torch.zeros(shape, dtype=F64), table, 3)
    assert torch.equal(feedback(weight, grid, moment, damping=0.0), by_least_squares(weight, grid, moment))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, 64])
def test_feedback_is_better_than_rounding_on_correlated_inputs(bits, group):
    found = {"nearest": 0.0, "feedback": 0.0}
    for seed in range(6):
        weight, second = normal(24, 64, seed=seed), correlated(64, seed=seed + 100)
        for rounding in found:
            map_ = quantize(weight, Coding(bits, group, rounding), second, dtype=F64)
            found[rounding] += error(weight, map_.dense(), second)
    assert found["feedback"] < 0.6 * found["nearest"]


def test_without_correlations_feedback_is_rounding():
    weight = normal(6, 32)
    both = [quantize(weight, Coding(4, 8, rounding), torch.eye(32), dtype=F64) for rounding in ("nearest", "feedback")]
    assert both[0] == both[1]
    assert quantize(weight, Coding(4, 8), torch.zeros(32, 32), dtype=F64).dense().isfinite().all()


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (1, 1), (7, 7), (3, 0), (0, 3)])
@pytest.mark.parametrize("levels", ["uniform", "learned"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_sizes_are_known_beforehand(shape, levels, symmetric):
    coding = Coding(3, 16, levels=levels, symmetric=symmetric)
    map_ = quantize(normal(*shape), coding, torch.eye(shape[1]), dtype=torch.float16)
    blank = blank_quantized(shape, coding, torch.float16)
    assert map_.shape == shape
    assert map_.spec() == blank.spec()
    assert (map_.nbytes, map_.numbers) == (blank.nbytes, blank.numbers)


def test_groups_run_where_fewer_scales_are_needed():
    coding = Coding(4, 64)
    assert quantize(normal(200, 5), coding).axis == "columns"
    assert quantize(normal(200, 5), coding).scale.shape == (5, 4)
    assert quantize(normal(5, 200), coding).axis == "rows"


def test_a_constant_group_is_exact_and_codings_are_checked():
    weight = torch.full((2, 8), 0.3, dtype=F64)
    torch.testing.assert_close(quantize(weight, Coding(2, 4), dtype=F64).dense(), weight)
    with pytest.raises(EckartError, match="bits must be one of 2, 3, 4, 5, 6, 8, or 0 for no codes, got 7"):
        Coding(7)
    with pytest.raises(EckartError, match="at least 1, got 0"):
        Coding(4, 0)
