"""Low rank plus sparse: both limits, a planted sum, counts, and refusals."""

import pytest
import torch

from eckart.errors import EckartError
from eckart.fit import Metric, error_of, regress
from eckart.fit.families import sparse_plus_lowrank_family
from eckart.fit.sparse_plus_lowrank import fit_sparse_plus_lowrank
from eckart.maps import Bitmap, LowRank, Sum, bitmap


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, seed: int) -> torch.Tensor:
    x = normal(80, n, seed=seed) @ normal(n, n, seed=seed + 1)
    return x.mT @ x / 80


def test_without_entries_it_is_the_regression():
    weight, metric = normal(9, 7, seed=0), Metric(inputs=moment(7, 1), outputs=moment(9, 3))
    found = error_of(weight, fit_sparse_plus_lowrank(weight, metric, 3, 0, iterations=2).dense(), metric)
    assert found == pytest.approx(float(regress(weight, metric).errors()[3]), rel=1e-7)


def test_without_rank_it_keeps_the_largest_scaled_entries():
    weight, metric = normal(9, 7, seed=4), Metric(inputs=moment(7, 5))
    scale = metric.inputs.diagonal().sqrt()
    found = fit_sparse_plus_lowrank(weight, metric, 0, 3).dense()
    torch.testing.assert_close(found, bitmap(weight * scale, 3).dense() / scale)


@pytest.mark.parametrize("with_metric", [False, True])
def test_a_planted_sum_is_found(with_metric):
    low = normal(40, 2, seed=6) @ normal(2, 30, seed=7)
    entries = torch.zeros(40, 30, dtype=torch.float64)
    entries[torch.arange(40), torch.arange(40) % 30] = 20.0
    weight, metric = low + entries, Metric(inputs=moment(30, 8) if with_metric else None)
    zero = error_of(weight, torch.zeros_like(weight), metric)
    found = fit_sparse_plus_lowrank(weight, metric, 2, 1)
    assert error_of(weight, found.dense(), metric) < 1e-6 * zero
    assert float(regress(weight, metric).errors()[3]) > 0.1 * zero  # more numbers, hardly any of it


def test_the_family_counts_as_stated_and_improves():
    weight, metric = normal(24, 16, seed=9), Metric(inputs=moment(16, 10))
    family, errors = sparse_plus_lowrank_family(0.25, 5), []
    for size in (1, 4, 8, 12, 16):
        map_ = family.fit(weight, metric, size)
        assert isinstance(map_, Sum)
        assert [type(part) for part in map_.maps] == [LowRank, Bitmap]
        assert map_.numbers == family.numbers((24, 16), size)
        assert map_.nbytes - 8 * map_.numbers == family.index_bytes((24, 16), size)
        errors.append(error_of(weight, map_.dense(), metric))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 * errors[0]


def test_zero_weights_and_inputs():
    for weight in (torch.zeros(6, 5), torch.ones(6, 5)):
        assert torch.isfinite(fit_sparse_plus_lowrank(weight, Metric(inputs=torch.zeros(5)), 2, 2).dense()).all()


@pytest.mark.parametrize(("rank", "nonzeros"), [(5, 1), (-1, 1), (1, 6), (1, -1)])
def test_sizes_beyond_the_matrix(rank, nonzeros):
    with pytest.raises(EckartError, match=rf"rank {rank} plus {nonzeros} entries per row do not fit a 4 x 5 matrix"):
        fit_sparse_plus_lowrank(torch.ones(4, 5), Metric(), rank, nonzeros)
