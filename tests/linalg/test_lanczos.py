"""The largest eigenvalue by Lanczos against a full decomposition."""

import pytest
import torch

from eckart.linalg import largest_eigenvalue


def symmetric(values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return turn @ torch.diag(values) @ turn.mT


@pytest.mark.parametrize("lowest", [-50.0, -1.0, 0.5])
def test_it_is_the_largest_not_the_largest_in_size(lowest: float):
    values = torch.cat((torch.tensor([20.0, lowest]), torch.linspace(0, 5, 58))).double()
    matrix = symmetric(values)
    start = torch.randn(60, generator=torch.Generator().manual_seed(1)).double()
    few, more = (largest_eigenvalue(lambda v: matrix @ v, start, steps) for steps in (3, 12))
    assert few <= more <= 20 + 1e-9
    assert few > 5
    assert abs(more - 20) < 1e-6


def test_a_start_inside_an_invariant_space_ends_there():
    matrix, start = torch.diag(torch.tensor([3.0, 2.0, 9.0])), torch.tensor([1.0, 1.0, 0.0])
    assert abs(largest_eigenvalue(lambda v: matrix @ v, start, 10) - 3) < 1e-6
    assert largest_eigenvalue(lambda v: 0 * v, start, 10) == 0
