"""Filtered singular values: the value and the gradient against plain torch, where singular values repeat or vanish."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from eckart.errors import EckartError
from eckart.linalg import filtered_svd


def with_values(m: int, n: int, values: list[float], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.mT


def mask_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 50))
def test_values_and_gradients_of_separate_singular_values(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = with_values(m, n, [float(2.0 - 0.25 * i) for i in range(min(m, n))], seed).requires_grad_()
    mask = torch.rand(min(m, n), generator=generator, dtype=torch.float64).requires_grad_()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(filtered_svd(matrix, mask), (u * (s * mask)) @ v)
    assert gradcheck(filtered_svd, (matrix, mask))


@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6), (4, 4)])
@pytest.mark.parametrize(
    ("values", "mask"),
    [
        ([2.0, 2.0, 1.0, 1.0], (0.9, 0.9, 0.2, 0.2)),  # two pairs, filtered alike
        ([1.0, 1.0, 1.0, 1.0], (0.5, 0.5, 0.5, 0.5)),  # all the same: a multiple of an isometry
        ([3.0, 2.0, 2.0, 2.0], (1.0, 0.0, 0.0, 0.0)),
        ([2.0, 1.0, 0.0, 0.0], (1.0, 1.0, 0.0, 0.0)),  # rank-deficient, truncated at its rank
    ],
)
def test_gradients_at_repeated_singular_values(m, n, values, mask):
    """Which vectors belong to which of two equal values is open; the filtered matrix, and its derivative, are not."""
    matrix, fixed = with_values(m, n, values).requires_grad_(), torch.tensor(mask, dtype=torch.float64)
    assert gradcheck(lambda a: filtered_svd(a, fixed), (matrix,), eps=1e-5, atol=1e-4)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
def test_a_mask_of_ones_passes_every_gradient_on(values):
    matrix = with_values(5, 3, values).requires_grad_()
    above = torch.randn(5, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(filtered_svd(matrix, mask_of(1, 1, 1)), matrix, above)
    torch.testing.assert_close(got, above)


def test_where_no_derivative_exists_it_stays_finite():
    matrix, mask = with_values(5, 3, [1.0, 1.0, 1.0]).requires_grad_(), mask_of(1.0, 0.5, 0.0)
    for got in torch.autograd.grad(filtered_svd(matrix, mask).sum(), (matrix, mask)):
        assert torch.isfinite(got).all()
        assert got.abs().max() < 100


def test_wrong_shapes():
    with pytest.raises(EckartError, match=r"needs a matrix \(m, n\) and a mask .*, got \(4, 3\) and \(4,\)"):
        filtered_svd(torch.ones(4, 3), torch.ones(4))
