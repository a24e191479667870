"""A basis shared by layers: the closed form where there is one, monotone rounds where there is none, and clusters."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.errors import EckartError
from eckart.fit import Metric, error_of, regress
from eckart.fit.clustering import cluster
from eckart.fit.dictionary import dictionary_fitter, orthogonal_learner
from eckart.fit.shared import fit_shared, split_rows
from eckart.linalg import sketch
from eckart.maps import Diagonal, LowRank


def moment(n: int, generator: torch.Generator, samples: int | None = None) -> torch.Tensor:
    x = torch.randn(samples or 3 * n, n, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, n + 1).double().rsqrt()
    return x.mT @ x / x.shape[0]


def layers(seed: int, n: int, count: int, outputs: bool) -> tuple[list[torch.Tensor], list[Metric]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(8, n, generator=generator, dtype=torch.float64)
    weights, metrics = [], []
    for i in range(count):
        m = 3 + (seed + 2 * i) % 6
        weights.append(base[:m] + torch.randn(m, n, generator=generator, dtype=torch.float64))
        metrics.append(Metric(moment(n, generator), outputs=moment(m, generator) if outputs else None))
    return weights, metrics


def objective(weights, metrics, maps) -> float:
    """The sum of relative errors under each layer's own metric."""
    zero = [error_of(w, torch.zeros_like(w), metric) for w, metric in zip(weights, metrics, strict=True)]
    errors = [error_of(w, map_.dense(), metric) for w, map_, metric in zip(weights, maps, metrics, strict=True)]
    return sum(e / z for e, z in zip(errors, zero, strict=True))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 3), st.integers(1, 4))
def test_the_common_moment_is_the_regression_of_the_stack(seed, n, count, rank):
    weights, metrics = layers(seed, n, count, outputs=False)
    maps = fit_shared(weights, metrics, rank)
    assert all(map_.down is maps[0].down for map_ in maps)
    together = sum(metric.inputs for metric in metrics)
    whole = regress(torch.cat(weights), Metric(together)).factors(rank).dense()
    torch.testing.assert_close(torch.cat([map_.dense() for map_ in maps]), whole, atol=1e-8, rtol=1e-8)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(1, 4))
def test_output_metrics_weigh_the_common_basis(seed, n, rank):
    """Under one input moment for all, the best map of the stack under the block-diagonal output metric."""
    weights, metrics = layers(seed, n, 2, outputs=True)
    together = metrics[0].inputs
    metrics = [Metric(together, outputs=metric.outputs) for metric in metrics]
    maps = fit_shared(weights, metrics, rank)
    both = Metric(together, outputs=torch.block_diag(*(metric.outputs for metric in metrics)))
    best = regress(torch.cat(weights), both)
    stack = torch.cat([map_.dense() for map_ in maps])
    floor = 1e-9 * best.total
    assert error_of(torch.cat(weights), stack, both) <= float(best.errors()[min(rank, n, len(stack))]) + floor


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 3), st.integers(1, 4), st.booleans())
def test_rounds_never_raise_the_error_under_each_layers_own_metric(seed, n, count, rank, outputs):
    weights, metrics = layers(seed, n, count, outputs)
    errors = [objective(weights, metrics, fit_shared(weights, metrics, rank, rounds=r)) for r in (0, 1, 2, 6)]
    for before, after in itertools.pairwise(errors):
        assert after <= before + 1e-8


def test_rounds_reach_what_a_general_minimiser_finds():
    weights, metrics = layers(3, 6, 2, outputs=True)
    found = objective(weights, metrics, fit_shared(weights, metrics, 2, rounds=60))
    least = []
    for seed in range(4):
        torch.manual_seed(seed)
        start = fit_shared(weights, metrics, 2)
        parts = [one.up + 0.1 * seed * torch.randn_like(one.up) for one in start] + [start[0].down.clone()]
        parts = [part.requires_grad_(True) for part in parts]
        optimizer = torch.optim.LBFGS(parts, max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss(parts=parts, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for w, metric, up in zip(weights, metrics, parts, strict=False):
                change = w - up @ parts[-1]
                scale = torch.trace(metric.outputs @ w @ metric.inputs @ w.mT)
                total = total + torch.trace(metric.outputs @ change @ metric.inputs @ change.mT) / scale
            total.backward()
            return total

        optimizer.step(loss)
        least.append(float(loss().detach()))
    assert found <= min(least) * 1.01


def test_one_layer_alone_is_its_own_regression():
    weights, metrics = layers(1, 6, 1, outputs=True)
    for rounds in (0, 2):
        (alone,) = fit_shared(weights, metrics, 2, rounds=rounds)
        best = regress(weights[0], metrics[0]).factors(2).dense()
        torch.testing.assert_close(alone.dense(), best, atol=1e-7, rtol=1e-6)


def test_identity_and_diagonal_moments_are_added_up():
    weights, _ = layers(2, 5, 2, outputs=False)
    diagonal = torch.rand(5, dtype=torch.float64) + 0.1
    for metrics, together in (
        ([Metric(), Metric()], None),
        ([Metric(diagonal), Metric(diagonal)], 2 * diagonal),
        ([Metric(diagonal), Metric()], diagonal + 1),
        ([Metric(torch.diag(diagonal)), Metric()], torch.diag(diagonal + 1)),
    ):
        whole = regress(torch.cat(weights), Metric(together)).factors(2).dense()
        got = torch.cat([map_.dense() for map_ in fit_shared(weights, metrics, 2)])
        torch.testing.assert_close(got, whole, atol=1e-9, rtol=1e-9)


def test_rows_are_split_with_one_right_factor():
    weight, sizes = torch.randn(9, 6, dtype=torch.float64), [2, 4, 3]
    coded = dictionary_fitter(weight, Metric(), orthogonal_learner(2))(4, 2)
    for map_ in (LowRank(torch.randn(9, 3), torch.randn(3, 6)), coded):
        pieces = split_rows(map_, sizes)
        assert [piece.shape for piece in pieces] == [(m, 6) for m in sizes]
        assert torch.equal(torch.cat([piece.dense() for piece in pieces]), map_.dense())
        last = [list(piece.tensors().values())[-1] for piece in pieces]
        assert all(tensor is last[0] for tensor in last)
    with pytest.raises(EckartError, match="layers can share the right factor of low-rank maps and of dictionaries"):
        split_rows(Diagonal(torch.ones(9)), sizes)


@pytest.mark.parametrize(
    ("weights", "metrics", "message"),
    [
        (
            [torch.ones(2, 3), torch.ones(2, 4)],
            [Metric(), Metric()],
            r"needs layers with inputs of one size .*\[3, 4\]",
        ),
        ([torch.ones(2, 3)], [Metric(), Metric()], "got 2 metrics for 1 layers"),
        ([torch.ones(2, 3)], [Metric(torch.eye(3), mean=torch.ones(3))], "on the original inputs, uncentred"),
        ([torch.ones(2, 3)], [Metric(torch.eye(2))], r"inputs has shape \(2, 2\)"),
    ],
)
def test_layers_that_cannot_share(weights, metrics, message):
    with pytest.raises(EckartError, match=message):
        fit_shared(weights, metrics, 1)


def families(generator: torch.Generator) -> list[torch.Tensor]:
    """Six layers in two families, interleaved: the layers of a family live in one subspace, noise apart."""
    bases = [torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0] for _ in range(2)]
    decay = torch.arange(1, 25).double() ** -2
    out = []
    for i in range(6):
        left = torch.randn(30, 24, generator=generator, dtype=torch.float64)
        weight = left * decay @ bases[i % 2].mT
        out.append(weight / weight.norm())
    return out


def rank_of(rows: int) -> int:
    """Half of the numbers of a stack of that many rows and 24 columns."""
    return rows * 12 // (rows + 24)


@pytest.mark.parametrize("algorithm", ["residual", "incremental"])
def test_layers_that_agree_share_whether_they_are_adjacent_or_not(algorithm):
    matrices = families(torch.Generator().manual_seed(0))
    sketches = [sketch(matrix) for matrix in matrices]
    assert cluster(sketches, [30] * 6, rank_of, algorithm=algorithm) == [[0, 2, 4], [1, 3, 5]]
    assert cluster(sketches, [30] * 6, rank_of, algorithm=algorithm, threshold=0.0) == [[i] for i in range(6)]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000), st.sampled_from(["union", "residual", "incremental"]), st.sampled_from([0.9, 1.0, 2.0, 9.0])
)
def test_what_is_merged_keeps_what_was_promised(seed, algorithm, threshold):
    generator = torch.Generator().manual_seed(seed)
    matrices = families(generator)
    noisy = [
        m + 0.02 * torch.rand(1, generator=generator) * torch.randn(m.shape, generator=generator) for m in matrices
    ]
    found = cluster([sketch(m) for m in noisy], [30] * 6, rank_of, threshold=threshold, algorithm=algorithm)
    assert sorted(i for group in found for i in group) == list(range(6))
    for group in found:
        if len(group) == 1:
            continue
        rank = rank_of(30 * len(group))
        joint = float(torch.linalg.svdvals(torch.cat([noisy[i] for i in group]))[rank:].square().sum())
        separate = sum(float(torch.linalg.svdvals(noisy[i])[rank_of(30) :].square().sum()) for i in group)
        assert joint <= threshold * separate * (1 + 1e-9)


def test_spectra_alone_merge_only_where_error_is_allowed_to_grow():
    sketches = [sketch(matrix) for matrix in families(torch.Generator().manual_seed(1))]
    assert cluster(sketches, [30] * 6, rank_of, algorithm="union") == [[i] for i in range(6)]
    assert max(map(len, cluster(sketches, [30] * 6, rank_of, algorithm="union", threshold=100.0))) > 1


def test_unknown_algorithms_are_refused():
    with pytest.raises(EckartError, match="unknown algorithm 'magic'; choose one of union, residual, incremental"):
        cluster([], [], rank_of, algorithm="magic")
