"""Sums of Kronecker products: exact where there are enough, the truncated SVD without a metric, better under one."""

import pytest
import torch

from eckart.errors import EckartError
from eckart.fit import Metric, error_of
from eckart.fit.families import kronecker_family
from eckart.fit.kronecker import fit_kronecker
from eckart.maps import rank_bound, rearranged


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, seed: int) -> torch.Tensor:
    x = normal(40, n, seed=seed) @ normal(n, n, seed=seed + 1)
    return x.mT @ x / 40


WEIGHT = normal(6, 8, seed=0)


def test_a_planted_sum_is_found():
    planted = sum(torch.kron(normal(2, 4, seed=i), normal(3, 2, seed=9 + i)) for i in range(2))
    for metric in (Metric(), Metric(inputs=moment(8, 1), outputs=moment(6, 3))):
        torch.testing.assert_close(fit_kronecker(planted, metric, (2, 4), 2).dense(), planted)


@pytest.mark.parametrize("terms", [1, 3, 6])
def test_without_a_metric_it_is_the_truncated_svd_of_the_blocks(terms):
    found = fit_kronecker(WEIGHT, Metric(), (2, 4), terms)
    values = torch.linalg.svdvals(rearranged(WEIGHT, (2, 4), (3, 2)))
    assert error_of(WEIGHT, found.dense(), Metric()) == pytest.approx(float(values[terms:].square().sum()), abs=1e-12)
    assert found.numbers == terms * (8 + 6)


def test_under_a_metric_it_is_better_than_without():
    metric = Metric(inputs=moment(8, 5), outputs=moment(6, 7))
    plain, found = (error_of(WEIGHT, fit_kronecker(WEIGHT, m, (2, 4), 2).dense(), metric) for m in (Metric(), metric))
    assert found < 0.8 * plain


def test_rank_bound_is_the_product_of_ranks():
    map_ = fit_kronecker(normal(8, 8, seed=3), Metric(), (4, 1), 1)
    assert rank_bound(map_) == 2 == int(torch.linalg.matrix_rank(map_.dense()))


def test_what_does_not_fit_is_refused():
    with pytest.raises(EckartError, match="left factors of shape 4 x 2 do not divide a weight of shape 6 x 8"):
        fit_kronecker(WEIGHT, Metric(), (4, 2), 1)
    with pytest.raises(EckartError, match="1 to 6 Kronecker products of 2 x 4 left, got 7"):
        fit_kronecker(WEIGHT, Metric(), (2, 4), 7)


@pytest.mark.parametrize("shape", [(6, 8), (12, 20), (7, 9), (16, 3), (1, 4), (13, 11)])
def test_the_family_takes_what_it_says_at_every_size(shape):
    family, weight = kronecker_family(), normal(*shape, seed=4)
    m, n = shape
    for size in {1, family.largest(shape), *family.sizes(shape)}:
        fitted = family.fit(weight, Metric(inputs=moment(n, 1)), size)
        example = family.example(shape, size, torch.device("cpu"))
        assert fitted.shape == example.shape == shape
        assert fitted.numbers == example.numbers == family.numbers(shape, size)
        assert fitted.left.shape == example.left.shape
        assert fitted.nbytes == family.nbytes(shape, size, 8)
    assert family.fit(weight, Metric(), family.largest(shape)).dense().allclose(weight)
    (_, rows, columns), divisors = fitted.left.shape, [d for d in range(1, n + 1) if n % d == 0]
    assert rows * columns + (m // rows) * (n // columns) == min(rows * d + (m // rows) * (n // d) for d in divisors)
