"""Products that keep no dense matrix are those of the matrix, with all derivatives, and hold on to nothing large."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from eckart.maps import factored, multiply_by_rows, rows_of, sparse, support, tensor_train
from eckart.maps.support import multiply_sum
from eckart.testing.cases import MAKERS, cases


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def held_sizes(run: Callable[[], Tensor]) -> list[int]:
    """Return the sizes of the tensors that autograd keeps for backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        run()
    return sizes


@pytest.mark.parametrize("share", [0.05, 0.5])  # sampled by compressed rows, and written out
def test_a_trained_sparse_matrix_has_the_derivatives_of_the_dense_one(share: float):
    matrix = normal(30, 40) * (torch.rand(30, 40, generator=torch.Generator().manual_seed(1)) < share)
    map_ = sparse(matrix)
    places = matrix.nonzero(as_tuple=True)

    def product(x: Tensor, values: Tensor) -> Tensor:
        return type(map_)(values, map_.columns, map_.starts, map_.width)(x)

    x, values = normal(2, 3, 40, seed=2).requires_grad_(), map_.values.clone().requires_grad_()
    y, weights = product(x, values), normal(2, 3, 30, seed=3)
    torch.testing.assert_close(y, x @ matrix.mT)
    of_x, of_values = torch.autograd.grad(y, (x, values), weights)
    torch.testing.assert_close(of_x, weights @ matrix)
    torch.testing.assert_close(of_values, (weights.flatten(0, 1).mT @ x.flatten(0, 1))[places])
    assert gradcheck(product, (x, values), fast_mode=True)
    assert gradgradcheck(product, (x, values), fast_mode=True)
    assert max(held_sizes(lambda: product(x, values))) < matrix.numel()


@pytest.mark.parametrize("entries", [1 << 20, 200])  # in one block of rows, and in several
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_sparse_matrices_added_to_a_dense_one_have_the_derivatives_of_the_sum(
    share: float, entries: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(support, "ENTRIES", entries)
    weight, drawn = normal(30, 40, seed=4), torch.Generator().manual_seed(1)
    kept = [normal(30, 40, seed=i) * (torch.rand(30, 40, generator=drawn) < share) for i in range(2)]
    maps = [sparse(matrix) for matrix in kept]

    def product(x: Tensor, *values: Tensor) -> Tensor:
        terms = [(s, v, m.columns, m.starts) for s, v, m in zip((2.0, -0.5), values, maps, strict=True)]
        return multiply_sum(x, weight, terms)

    x, values = normal(2, 3, 40, seed=2).requires_grad_(), [m.values.clone().requires_grad_() for m in maps]
    y, weights, whole = product(x, *values), normal(2, 3, 30, seed=3), weight + 2 * kept[0] - 0.5 * kept[1]
    torch.testing.assert_close(y, x @ whole.mT)
    found = torch.autograd.grad(y, (x, *values), weights, retain_graph=True)
    torch.testing.assert_close(found[0], weights @ whole)
    for s, matrix, of_values in zip((2.0, -0.5), kept, found[1:], strict=True):
        dense = s * weights.flatten(0, 1).mT @ x.detach().flatten(0, 1)
        torch.testing.assert_close(of_values, dense[matrix.nonzero(as_tuple=True)])
    assert gradcheck(product, (x, *values), fast_mode=True)
    assert gradgradcheck(product, (x, *values), fast_mode=True)
    with torch.no_grad():
        assert torch.equal(product(x, *values), y)
    y.add_(1.0).sum().backward()  # what comes out may be written over
    assert max(held_sizes(lambda: product(x, values[0], values[1].detach()))) <= weight.numel()
    few = multiply_sum(x.float(), weight.float(), [(1.0, values[0].bfloat16(), maps[0].columns, maps[0].starts)])
    torch.testing.assert_close(few, x.float() @ (weight + kept[0]).float().mT, atol=0.1, rtol=0.0)


@pytest.mark.parametrize("step", [None, 1, 3, 7])
def test_products_by_rows_have_the_derivatives_of_the_matrix(step: int | None):
    up, down, mask = normal(7, 2).requires_grad_(), normal(2, 9, seed=1).requires_grad_(), normal(7, 9, seed=2) > 0

    def rows(start: int, stop: int, tensors: list[Tensor]) -> Tensor:
        return (tensors[0][start:stop] @ tensors[1]) * tensors[2][start:stop]

    def product(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return multiply_by_rows(x, rows, (up, down, mask), 7, step=step)

    x = normal(2, 5, 9, seed=3).requires_grad_()
    torch.testing.assert_close(product(x, up, down), x @ (up @ down * mask).mT)
    assert gradcheck(product, (x, up, down))
    assert gradgradcheck(product, (x, up, down), fast_mode=True)
    frozen = product(x, up.detach(), down)
    assert torch.autograd.grad(frozen.sum(), down, retain_graph=True)[0].any()
    many = normal(1, 9, seed=4).requires_grad_()  # fewer numbers than the matrix
    assert max(held_sizes(lambda: product(many, up, down))) <= mask.numel()
    assert sum(size == mask.numel() for size in held_sizes(lambda: product(many, up, down))) == 1  # the mask itself


@pytest.mark.parametrize("family", MAKERS)
def test_rows_of_a_map_are_those_of_its_matrix(family: str):
    for case in cases(family):
        m = case.matrix.shape[0]
        for start, stop in ((0, m), (0, 1), (m // 2, m), (m - 1, m)):
            torch.testing.assert_close(rows_of(case.map, start, stop).double(), case.matrix[start:stop])


def test_a_tensor_train_keeps_its_cores_and_its_input_only():
    train = tensor_train([normal(1, 8, 8, 4), normal(4, 8, 8, 4, seed=1), normal(4, 8, 8, 1, seed=2)])
    x, entries = normal(600, 512).requires_grad_(), train.entries.requires_grad_()
    assert set(held_sizes(lambda: train(x))) == {x.numel(), entries.numel()}
    few = train(x[:2])
    torch.testing.assert_close(few, train(x)[:2])


@given(st.integers(1, 5000), st.integers(1, 5))
def test_factors_multiply_to_the_size(size: int, count: int):
    found = factored(size, count)
    assert len(found) == count
    assert torch.tensor(found).prod() == size


def test_factors_are_near_each_other():
    assert factored(4096, 3) == (16, 16, 16)
    assert factored(11008, 3) == (16, 16, 43)
    assert factored(48, 2) == (6, 8)
    assert factored(13, 2) == (1, 13)
