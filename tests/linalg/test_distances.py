"""Distances have the values and derivatives that pair by pair they have."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from eckart.linalg import distances


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_distances_are_those_of_all_pairs_with_all_derivatives(lead: tuple[int, ...]):
    x, y = normal(*lead, 5, 3).requires_grad_(), normal(*lead, 7, 3, seed=1).requires_grad_()
    wanted = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1).sqrt()
    torch.testing.assert_close(distances(x, y), wanted)
    assert gradcheck(distances, (x, y))
    assert gradgradcheck(distances, (x, y), fast_mode=True)
    weights = normal(*lead, 5, 7, seed=2)
    for one, other in ((x, y.detach()), (x.detach(), y)):
        leaf = one if one.requires_grad else other
        found = torch.autograd.grad((distances(one, other) * weights).sum(), leaf)[0]
        torch.testing.assert_close(found, torch.autograd.grad((wanted * weights).sum(), leaf, retain_graph=True)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_near_pairs_are_not_lost_to_rounding(dtype: torch.dtype, tolerance: float):
    x = normal(6, 4, dtype=dtype)
    y = (x.double() + 1e-3 * normal(6, 4, seed=1)).to(dtype)
    wanted = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = distances(x, y)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=0.0)


def test_where_two_meet_the_gradient_is_zero():
    x = normal(3, 2, dtype=torch.float32).requires_grad_()
    distances(x, x.detach().clone()).diagonal().sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
