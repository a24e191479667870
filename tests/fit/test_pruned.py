"""Sparse maps: least squares against a dense solver, ADMM against thresholding, every kind of entries improved."""

import pytest
import torch

from eckart.fit import Metric, error_of
from eckart.fit.dictionary import keep_largest, orthogonal_learner
from eckart.fit.families import dictionary_family, n_of_m_family, sparse_family, sparse_plus_lowrank_family
from eckart.fit.pruned import improve_entries, pruner
from eckart.maps import NM, Bitmap, Dense, bitmap


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, seed: int) -> torch.Tensor:
    x = normal(40, n, seed=seed) @ normal(n, n, seed=seed + 1)
    return x.mT @ x / 40 + torch.eye(n, dtype=torch.float64)


WEIGHT = normal(12, 16, seed=0)
METRIC = Metric(inputs=moment(16, 1), outputs=moment(12, 3))


def exact(mask: torch.Tensor) -> torch.Tensor:
    """Return the entries of least error at some places, by one dense solve."""
    whole = torch.kron(METRIC.outputs, METRIC.inputs)
    at = mask.flatten().nonzero()[:, 0]
    values = torch.linalg.solve(whole[at][:, at], (whole @ WEIGHT.flatten())[at])
    return torch.zeros(WEIGHT.numel(), dtype=torch.float64).scatter(0, at, values).view_as(WEIGHT)


def test_entries_approach_least_squares():
    start = bitmap(WEIGHT, 5)
    found = start
    for _ in range(8):
        found = improve_entries(WEIGHT, METRIC, found)
    assert torch.equal(found.bits, start.bits)
    torch.testing.assert_close(found.dense(), exact(start.dense() != 0), atol=1e-4, rtol=1e-4)


def test_places_are_better_than_the_largest_entries():
    rows_apart = Metric(inputs=METRIC.inputs)
    scale = METRIC.inputs.diagonal().sqrt()
    found = error_of(WEIGHT, pruner(WEIGHT, rows_apart)(lambda w: keep_largest(w, 6)), rows_apart)
    assert found < 0.6 * error_of(WEIGHT, keep_largest(WEIGHT * scale, 6) / scale, rows_apart)


def test_without_a_metric_the_largest_entries_stay():
    torch.testing.assert_close(pruner(WEIGHT, Metric())(lambda w: keep_largest(w, 6)), keep_largest(WEIGHT, 6))
    assert sparse_family().fit(WEIGHT, Metric(), 6).dense().equal(keep_largest(WEIGHT, 6))


@pytest.mark.parametrize(
    ("family", "size"),
    [
        (sparse_family(), 6),
        (n_of_m_family(4), 2),
        (sparse_plus_lowrank_family(iterations=5), 5),
        (dictionary_family(orthogonal_learner(5)), 9),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("metric", [METRIC, Metric(inputs=METRIC.inputs), Metric()], ids=["both", "inputs", "none"])
def test_improving_lowers_the_error_in_as_many_numbers(family, size, metric):
    start = family.fitter(WEIGHT, metric)(size)
    found = improve_entries(WEIGHT, metric, start)
    before, after = (error_of(WEIGHT, map_.dense(), metric) for map_ in (start, found))
    assert after <= before * (1 + 1e-9)
    assert after < before or metric.outputs is None
    assert found.spec() == start.spec()
    assert found.numbers <= family.numbers((12, 16), size)
    found.validate()


def test_families_say_what_they_take():
    sparse, pattern = sparse_family(), n_of_m_family(4)
    for family, kind in ((sparse, Bitmap), (pattern, NM)):
        map_ = family.fit(WEIGHT, METRIC, 3).to(torch.float16)
        assert isinstance(map_, kind)
        assert map_.numbers == family.numbers((12, 16), 3)
        assert map_.nbytes == family.nbytes((12, 16), 3, 2)
    assert pattern.sizes((12, 18)) == []  # 4 does not divide 18
    assert pattern.sizes((12, 16)) == [1, 2, 3]


def test_other_maps_are_left_alone():
    assert improve_entries(WEIGHT, METRIC, Dense(WEIGHT)) == Dense(WEIGHT)
