"""Truncated SVDs by every method against torch.linalg.svd, with the error of every rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg import truncated_svd

sizes = st.integers(1, 15)
seeds = st.integers(0, 10**6)


def matrix_of(m: int, n: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return (left @ right).to(dtype)


def tail_of(matrix: Tensor) -> Tensor:
    squares = torch.linalg.svdvals(matrix.double()).square()
    return torch.cat((squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)))


@pytest.mark.parametrize("method", ["auto", "exact", "gram", "krylov"])
@given(sizes, sizes, st.integers(0, 15), st.integers(0, 16), seeds)
def test_equals_the_svd(method: str, m: int, n: int, rank: int, k: int, seed: int):
    matrix = matrix_of(m, n, min(rank, m, n), seed)
    found = truncated_svd(matrix, k, method=method, accuracy=1e-6 if method == "krylov" else 0.0)
    values = torch.linalg.svdvals(matrix)
    k = min(k, m, n)
    scale = max(float(values.max()), 1e-30)
    assert found.rank == k
    assert found.left.shape == (m, k)
    assert found.right.shape == (k, n)
    assert torch.allclose(found.values, values[:k], atol=(1e-12 if method == "exact" else 1e-7) * scale, rtol=0)
    assert torch.allclose(found.left.mT @ found.left, torch.eye(k, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(found.right @ found.right.mT, torch.eye(k, dtype=torch.float64), atol=1e-7)
    tail = tail_of(matrix)
    assert torch.allclose(found.errors, tail[: len(found.errors)], atol=1e-10 * scale**2 * (m + n), rtol=0)
    assert len(found.errors) >= k + 1
    error = float((matrix - found.dense()).square().sum())
    assert error == pytest.approx(float(tail[k]), abs=1e-10 * scale**2 * (m + n))


@given(sizes, sizes, seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_low_precision_is_computed_in_float64(m: int, n: int, seed: int, dtype: torch.dtype):
    matrix = matrix_of(m, n, min(m, n), seed, dtype)
    found = truncated_svd(matrix)
    assert found.left.dtype == found.values.dtype == found.right.dtype == torch.float32
    assert found.errors.dtype == torch.float64
    assert torch.allclose(found.dense(), matrix.float(), atol=1e-5 * max(1.0, float(matrix.abs().max())))


@given(sizes, sizes, seeds, st.floats(0, 1.2))
def test_a_tolerance_is_met_by_the_smallest_rank(m: int, n: int, seed: int, tolerance: float):
    matrix = matrix_of(m, n, min(m, n), seed)
    size = float(matrix.norm())
    for method in ("exact", "gram", "krylov"):
        found = truncated_svd(matrix, tolerance=tolerance, method=method)
        assert float((matrix - found.dense()).norm()) <= tolerance * size + 1e-7 * size
        if found.rank:
            smaller = truncated_svd(matrix, found.rank - 1, method="exact")
            assert float((matrix - smaller.dense()).norm()) > tolerance * size - 1e-7 * size


@pytest.mark.parametrize("method", ["exact", "gram", "krylov"])
@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_small_singular_values_are_resolved(method: str, shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(s, 30, generator=generator, dtype=torch.float64))[0] for s in shape)
    values = torch.logspace(0, -10, 30, dtype=torch.float64)
    found = truncated_svd((left * values) @ right.mT, method=method)
    assert torch.allclose(found.values, values, rtol=1e-3, atol=1e-12)
    for vectors in (found.left.mT, found.right):
        assert torch.allclose(vectors @ vectors.mT, torch.eye(30, dtype=torch.float64), atol=1e-6)


def test_extremes():
    assert truncated_svd(torch.zeros(3, 4)).values.tolist() == [0, 0, 0]
    assert truncated_svd(torch.zeros(3, 4), tolerance=0.1).rank == 0
    assert truncated_svd(torch.zeros(0, 4)).rank == 0
    assert truncated_svd(torch.ones(3, 4), 0).dense().equal(torch.zeros(3, 4))
    for method in ("exact", "gram", "krylov"):
        assert torch.isfinite(truncated_svd(torch.ones(5, 3), method=method).dense()).all()


def test_auto_chooses_by_size():
    small, large = matrix_of(20, 30, 5, 0), matrix_of(200, 150, 150, 0)
    assert truncated_svd(small).method == "exact"
    assert truncated_svd(large, 5).method == "gram"
    assert truncated_svd(large, 5, accuracy=1e-2).method == "gram"


@pytest.mark.parametrize("shape", [(1030, 1100), (1100, 1030)])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-3), (torch.float64, 1e-5)])
def test_krylov_reaches_its_accuracy(shape: tuple[int, int], dtype: torch.dtype, accuracy: float):
    generator = torch.Generator().manual_seed(0)
    short = min(shape)
    left, right = (torch.linalg.qr(torch.randn(s, short, generator=generator, dtype=torch.float64))[0] for s in shape)
    values = torch.arange(1, short + 1, dtype=torch.float64) ** -0.7
    matrix = ((left * values) @ right.mT).to(dtype)
    found = truncated_svd(matrix, 40, accuracy=accuracy)
    assert found.method.startswith("krylov")
    assert found.left.dtype == dtype
    for vectors in (found.left.mT, found.right):
        assert torch.allclose((vectors @ vectors.mT).double(), torch.eye(40, dtype=torch.float64), atol=1e-5)
    optimum = float(values[40:].square().sum().sqrt())
    assert float((matrix.double() - found.dense().double()).norm()) <= (1 + accuracy) * optimum
    assert float(found.errors[-1]) == pytest.approx(optimum**2, rel=5e-3)
    by_tolerance = truncated_svd(matrix, tolerance=0.5, accuracy=1e-3, method="krylov")
    assert by_tolerance.rank == truncated_svd(matrix, tolerance=0.5, method="gram").rank


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": torch.ones(3)}, r"needs a matrix, got a tensor of shape \(3,\)"),
        ({"method": "fast"}, "unknown SVD method 'fast'; choose one of auto, exact, gram, krylov"),
        ({"rank": 1, "tolerance": 0.1}, "either a rank or a tolerance"),
        ({"rank": -1}, "rank must not be negative, got -1"),
        ({"tolerance": -0.1}, "tolerance must not be negative, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must not be negative, got nan"),
        ({"accuracy": -1.0}, "accuracy must not be negative"),
        ({"matrix": torch.tensor([[1.0, float("nan")]])}, r"of shape \(1, 2\) holds NaN or Inf"),
        ({"matrix": torch.tensor([[1.0, float("inf")]])}, "holds NaN or Inf"),
        ({"matrix": torch.ones(2, 2, dtype=torch.int64)}, "floating"),
    ],
)
def test_refused_in_one_sentence(arguments, message: str):
    with pytest.raises(EckartError, match=message) as caught:
        truncated_svd(**{"matrix": torch.ones(2, 2), **arguments})
    assert "\n" not in str(caught.value)
