"""A matrix plus low-rank ones in one step has the values and derivatives of the sum, and keeps what it needs only."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from eckart.linalg import factored_sum

M, N = 7, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0, 4)])
@pytest.mark.parametrize("trained", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_sum_with_all_derivatives(lead: tuple[int, ...], trained: tuple[bool, bool], biased: bool):
    weight, bias, scales = normal(M, N), normal(M, seed=1) if biased else None, (2.0, -1.0)
    factors = [normal(M, 2, seed=2), normal(2, N, seed=3), normal(M, 3, seed=4), normal(3, N, seed=5)]
    for factor, trains in zip(factors, (trained[0], trained[0], trained[1], trained[1]), strict=True):
        factor.requires_grad_(trains)
    x = normal(*lead, N, seed=6).requires_grad_()

    def product(x: Tensor, *factors: Tensor) -> Tensor:
        return factored_sum(x, weight, bias, list(zip(scales, factors[::2], factors[1::2], strict=True)))

    whole = weight + sum(s * u @ d for s, u, d in zip(scales, factors[::2], factors[1::2], strict=True))
    wanted = x @ whole.mT if bias is None else x @ whole.mT + bias
    found, weights = product(x, *factors), normal(*lead, M, seed=7)
    torch.testing.assert_close(found, wanted)
    leaves = [x, *(f for f in factors if f.requires_grad)]
    pairs = (torch.autograd.grad(y, leaves, weights, retain_graph=True) for y in (found, wanted))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(product(x, *factors), found)
    if x.numel():
        assert gradcheck(product, (x, *factors))
        assert gradgradcheck(product, (x, *factors), fast_mode=True)
    found.add_(1.0).sum().backward()  # what comes out may be written over


def test_factors_of_another_dtype_are_cast_and_get_gradients_of_theirs():
    weight, x = normal(M, N).bfloat16(), normal(4, N, seed=1).bfloat16().requires_grad_()
    up, down = normal(M, 2, seed=2).float().requires_grad_(), normal(2, N, seed=3).float().requires_grad_()
    y = factored_sum(x, weight, None, [(0.5, up, down)])
    assert y.dtype == torch.bfloat16
    wide = x.detach().float() @ (weight.float() + 0.5 * up @ down).mT
    torch.testing.assert_close(y.float(), wide, atol=0.1, rtol=0.05)
    y.sum().backward()
    assert (x.grad.dtype, up.grad.dtype, down.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_what_does_not_train_keeps_nothing():
    weight, x = normal(M, N), normal(50, N, seed=1).requires_grad_()
    fixed, moved = ([normal(M, 4, seed=s), normal(4, N, seed=s)] for s in (2, 3))
    for factor in moved:
        factor.requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        factored_sum(x, weight, None, [(-1.0, *fixed), (1.0, *moved)])
    assert sorted(sizes) == sorted(8 * t.numel() for t in (x, weight, *fixed, *moved, normal(50, 4)))
