"""Pivot rows reproduce the matrix with bounded coefficients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.linalg import pivot_rows


@given(st.integers(1, 25), st.integers(0, 25), st.integers(0, 10**6), st.sampled_from([1.01, 1.05, 2.0]))
def test_the_other_rows_are_bounded_combinations_of_the_pivots(m: int, k: int, seed: int, growth: float):
    k = min(k, m)
    matrix = torch.randn(m, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = matrix * torch.logspace(0, -4, k, dtype=torch.float64)
    found = pivot_rows(matrix, growth)
    assert sorted([*found.rows.tolist(), *found.rest.tolist()]) == list(range(m))
    assert found.rest.tolist() == sorted(found.rest.tolist())
    assert found.coefficients.shape == (m - k, k)
    assert torch.allclose(found.coefficients @ matrix[found.rows], matrix[found.rest], atol=1e-10)
    if found.coefficients.numel():
        assert float(found.coefficients.abs().max()) <= growth * (1 + 1e-6)


def test_swaps_are_needed_and_made():
    """Elimination alone leaves this matrix of Kahan's kind with large coefficients."""
    n = 12
    matrix = torch.eye(n, dtype=torch.float64) - torch.tril(torch.ones(n, n, dtype=torch.float64), -1)
    tall = torch.cat((matrix, torch.ones(3, n, dtype=torch.float64)))
    assert float(pivot_rows(tall, max_swaps=0).coefficients.abs().max()) > 1.05
    assert float(pivot_rows(tall).coefficients.abs().max()) <= 1.05 * (1 + 1e-9)


def test_many_swaps_end_at_bounded_coefficients():
    """Every swap builds on the update of the one before."""
    matrix = torch.randn(300, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(pivot_rows(matrix, max_swaps=0).coefficients.abs().max()) > 1.2
    found = pivot_rows(matrix)
    assert float(found.coefficients.abs().max()) <= 1.05 * (1 + 1e-6)
    assert torch.allclose(found.coefficients @ matrix[found.rows], matrix[found.rest], rtol=1e-8, atol=1e-6)


def test_the_first_rows_may_be_dependent():
    matrix = torch.cat((torch.zeros(3, 2), torch.ones(1, 2), torch.eye(2)))
    assert set(pivot_rows(matrix).rows.tolist()) < {3, 4, 5}


def test_float32_is_computed_in_float64():
    matrix = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert pivot_rows(matrix).coefficients.dtype == torch.float64


def test_a_deficient_matrix_has_no_pivots():
    matrix = torch.ones(4, 2)
    matrix[:, 1] = 0
    with pytest.raises(torch.linalg.LinAlgError):
        pivot_rows(matrix)
