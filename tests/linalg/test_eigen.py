"""Eigenpairs of PSD matrices against torch.linalg.eigh, dense and Krylov; shrinkage and roots by their formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg import psd_roots, regular_cholesky, shrink, top_eigen
from eckart.linalg.eigen import KRYLOV_MIN_SIZE, _complement_trace, _KrylovSpace, _orthonormalize

sizes = st.integers(1, 20)
seeds = st.integers(0, 10**6)


def psd(n: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a PSD matrix of a rank with eigenvalues from 1 to about 1e-3."""
    root = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    root = root * torch.logspace(0, -1.5, rank, dtype=torch.float64)
    return (root @ root.mT).to(dtype)


@given(sizes, st.integers(0, 20), seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_dense_equals_eigh(n: int, rank: int, seed: int, dtype: torch.dtype):
    matrix = psd(n, min(rank, n), seed, dtype)
    k = 1 + seed % n
    found = top_eigen(matrix, k)
    wanted = torch.linalg.eigvalsh((matrix + matrix.mT).double() / 2).flip(0).clamp_min(0)
    scale = max(float(wanted[0]), 1e-30)
    assert found.method == "dense"
    assert found.excess == 0.0
    assert torch.allclose(found.values, wanted[:k], atol=1e-12 * scale, rtol=0)
    assert torch.allclose(found.vectors.mT @ found.vectors, torch.eye(k, dtype=torch.float64), atol=1e-10)
    residual = matrix.double() @ found.vectors - found.vectors * found.values
    # Low-precision input may be slightly asymmetric or indefinite, which the residual sees and the values do not.
    assert float(residual.norm()) <= (1e-10 + 10 * n * torch.finfo(dtype).eps) * scale
    tails = torch.cat((wanted.flip(0).cumsum(0).flip(0), wanted.new_zeros(1)))
    assert torch.allclose(found.tails(), tails[: k + 1], atol=1e-10 * scale * n, rtol=0)


def test_all_pairs_and_none():
    matrix = psd(6, 6, 0)
    assert top_eigen(matrix).values.shape == (6,)
    assert top_eigen(matrix, 100).values.shape == (6,)
    none = top_eigen(matrix, 0)
    assert none.values.shape == (0,)
    assert none.tails().tolist() == pytest.approx([float(matrix.trace())])


def test_a_function_needs_a_size_and_equals_its_matrix():
    matrix = psd(9, 9, 1)
    with pytest.raises(EckartError, match="needs the size"):
        top_eigen(lambda block: matrix @ block, 2)
    found = top_eigen(lambda block: matrix @ block, 2, size=9)
    assert torch.allclose(found.values, top_eigen(matrix, 2).values)
    with pytest.raises(EckartError, match="rank must not be negative, got -1"):
        top_eigen(matrix, -1)


def spectrum(kind: str, n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    if kind == "deficient":
        return torch.where(i <= 60, 1 / i, 0.0)
    return {
        "power": 1 / i,
        "steep": torch.exp(-i / 20),
        "slow": i**-0.5,
        "plateau": torch.where(i <= 40, i * 0 + 1, 0.01),
    }[kind]


@pytest.fixture(scope="module")
def basis() -> Tensor:
    n = KRYLOV_MIN_SIZE
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("accuracy", [1e-2, 1e-4])
@pytest.mark.parametrize("kind", ["power", "steep", "slow", "plateau", "deficient"])
def test_krylov_reaches_its_accuracy(basis: Tensor, kind: str, accuracy: float, dtype: torch.dtype):
    """The tail left behind is measured on the matrix, not taken from what the solver says of itself."""
    values = spectrum(kind, basis.shape[0])
    matrix = ((basis * values) @ basis.mT).to(dtype)
    k = 40
    found = top_eigen(matrix, k, accuracy=accuracy, seed=1)
    assert found.method.startswith("krylov")
    vectors = found.vectors.double()
    assert torch.allclose(vectors.mT @ vectors, torch.eye(k, dtype=torch.float64), atol=1e-4)
    optimum = float(values[k:].sum())
    left_behind = float(values.sum()) - float(torch.linalg.eigvalsh(vectors.mT @ matrix.double() @ vectors).sum())
    assert left_behind <= (1 + accuracy) * optimum + 1e-6 * float(values.sum())
    assert float(found.tails()[-1]) == pytest.approx(optimum, rel=2 * accuracy, abs=1e-5)
    assert torch.allclose(found.values, values[:k], rtol=0.05)


def test_krylov_works_in_float64_where_float32_hides_the_tail(basis: Tensor):
    values = spectrum("steep", basis.shape[0])
    matrix, k, accuracy = (basis * values) @ basis.mT, 250, 1e-3
    found = top_eigen(matrix, k, accuracy=accuracy)
    left_behind = float(values.sum()) - float((found.vectors.double().mT @ matrix @ found.vectors.double()).trace())
    assert left_behind <= (1 + accuracy) * float(values[k:].sum())
    assert found.method == "krylov-float64"
    assert top_eigen(matrix, 40, accuracy=accuracy).method == "krylov-float32"


def test_krylov_is_not_used_where_dense_is_cheaper(basis: Tensor):
    matrix = (basis * spectrum("power", basis.shape[0])) @ basis.mT
    assert top_eigen(matrix[:1023, :1023], 10, accuracy=1e-2).method == "dense"
    assert top_eigen(matrix, 10).method == "dense"


def test_krylov_repeats_with_its_seed(basis: Tensor):
    matrix = (basis * spectrum("power", basis.shape[0])) @ basis.mT
    first, second, other = (top_eigen(matrix, 5, accuracy=1e-2, seed=seed) for seed in (3, 3, 4))
    assert first.vectors.equal(second.vectors)
    assert not first.vectors.equal(other.vectors)


def test_krylov_estimates_a_trace_it_is_not_given(basis: Tensor):
    matrix = (basis * spectrum("power", basis.shape[0])) @ basis.mT
    found = top_eigen(lambda block: matrix.to(block.dtype) @ block, 40, size=basis.shape[0], accuracy=1e-2)
    assert found.method.startswith("krylov")
    assert found.trace == pytest.approx(float(matrix.trace()), rel=0.01)


def test_a_flat_spectrum_falls_back_to_dense(basis: Tensor):
    """Nothing separates the eigenvectors, so no small basis meets a strict accuracy."""
    values = torch.linspace(1.0, 0.9, basis.shape[0], dtype=torch.float64)
    found = top_eigen((basis * values) @ basis.mT, 300, accuracy=1e-8)
    assert found.method == "dense"
    assert torch.allclose(found.values, values[:300], atol=1e-10)


@given(st.integers(2, 30), st.integers(1, 5), seeds)
def test_krylov_space_is_orthonormal_and_projects(n: int, block: int, seed: int):
    block = min(block, n // 2)
    matrix = psd(n, n, seed)
    start = torch.randn(n, block, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    space = _KrylovSpace(lambda x: matrix @ x, start)
    space.expand_to(block)
    assert space.size == block
    space.expand_to(min(2 * block, n - n % block))
    basis = space.basis()
    assert torch.allclose(basis @ basis.mT, torch.eye(space.size, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(space.projected(), basis @ matrix @ basis.mT, atol=1e-8)


@given(st.integers(1, 15), seeds, st.booleans())
def test_orthonormalize_keeps_the_span(n: int, seed: int, dependent: bool):
    k = 1 + seed % n
    block = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if dependent and k > 1:
        block[:, -1] = block[:, 0] * (1 + 1e-12)
    found = _orthonormalize(block.mT).mT
    assert torch.allclose(found.mT @ found, torch.eye(k, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(found @ (found.mT @ block), block, atol=1e-8)


def test_complement_trace_is_unbiased():
    matrix = psd(40, 40, 2)
    basis = torch.linalg.qr(torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].mT
    rest = torch.eye(40, dtype=torch.float64) - basis.mT @ basis
    wanted = float((rest @ matrix @ rest).trace())
    found = _complement_trace(lambda x: matrix @ x, basis, torch.Generator().manual_seed(0), probes=4000)
    assert found == pytest.approx(wanted, rel=0.05)


@given(sizes, seeds, st.floats(0, 1))
def test_shrink(n: int, seed: int, amount: float):
    moment = psd(n, n, seed)
    mean = float(moment.diagonal().mean())
    wanted = (1 - amount) * moment + amount * mean * torch.eye(n, dtype=torch.float64)
    assert torch.allclose(shrink(moment, amount), wanted)
    assert torch.allclose(shrink(moment.diagonal(), amount), wanted.diagonal())
    assert float(shrink(moment, amount).trace()) == pytest.approx(float(moment.trace()))


def test_shrink_leaves_its_input_and_refuses_other_amounts():
    moment = psd(3, 3, 0)
    before = moment.clone()
    shrink(moment, 0.5)
    assert moment.equal(before)
    assert shrink(moment, 0.0) is moment
    assert shrink(moment[:0, :0], 0.5).shape == (0, 0)
    for amount in (-0.1, 1.1, float("nan")):
        with pytest.raises(EckartError, match=r"shrinkage must lie in \[0, 1\]"):
            shrink(moment, amount)


@given(sizes, st.integers(0, 20), seeds)
def test_psd_roots(n: int, rank: int, seed: int):
    moment = psd(n, min(rank, n), seed)
    root, inverse = psd_roots(moment)
    scale = max(float(moment.diagonal().sum()), 1e-30)
    identity = torch.eye(n, dtype=torch.float64)
    wanted = moment if rank else identity  # a zero moment prefers no direction
    assert torch.allclose(root @ root, wanted, atol=1e-10 * scale if rank else 1e-12)
    assert torch.allclose(root, root.mT)
    assert torch.allclose(root @ inverse, identity, atol=1e-6)
    diagonal_root, diagonal_inverse = psd_roots(moment.diagonal())
    assert torch.allclose(diagonal_root.square(), wanted.diagonal(), atol=1e-10 * scale if rank else 1e-12)
    assert torch.allclose(diagonal_root * diagonal_inverse, torch.ones(n, dtype=torch.float64))


def test_psd_roots_of_nothing_and_of_a_singular_moment():
    assert psd_roots(torch.zeros(0, 0))[0].shape == (0, 0)
    assert psd_roots(torch.zeros(0))[1].shape == (0,)
    for moment in (torch.diag(torch.tensor([4.0, 0.0])), torch.tensor([4.0, 0.0])):
        root, inverse = psd_roots(moment)
        assert torch.isfinite(inverse).all()
        assert float(root.max()) == 2.0
        assert float(root.diagonal()[1] if root.ndim == 2 else root[1]) == pytest.approx(2e-6)


@given(sizes, st.floats(-16, 0), seeds)
def test_regular_cholesky_vouches_for_the_smallest_eigenvalue(n: int, power: float, seed: int):
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    values = torch.logspace(0, power, n, dtype=torch.float64)
    moment = (basis * values) @ basis.mT
    factor = regular_cholesky((moment + moment.mT) / 2, 1e-8)
    if n > 1 and power < -8.01:
        assert factor is None
    elif power > -8 + 2 * torch.tensor(float(n)).log10() + 0.01 or n == 1:  # the traces are n times off at most, each
        assert factor is not None
        assert torch.allclose(factor @ factor.mT, moment, atol=1e-12)


def test_regular_cholesky_refuses_what_has_no_inverse():
    assert regular_cholesky(torch.zeros(3, 3), 1e-10) is None
    assert regular_cholesky(torch.ones(3, 3), 1e-10) is None
    assert regular_cholesky(-torch.eye(3), 1e-10) is None
