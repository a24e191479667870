"""Leading singular triplets against torch.linalg.svd in float64, over shapes, spectra and ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg import add_upper_gram, leading_svd, mirror_upper

# Above the side from which filters are tried.
sides = st.integers(256, 330)
SPECTRA = {
    "slow": lambda i: i**-0.2,
    "root": lambda i: i**-0.5,
    "inverse": lambda i: 1 / i,
    "steep": lambda i: i**-2.0,
    "geometric": lambda i: 0.7**i,
    "pairs": lambda i: (i / 2).ceil() ** -0.5,
    "near pairs": lambda i: (i / 2).ceil() ** -0.5 * (1 - 1e-4 * ((i + 1) % 2)),
    "blocks of five": lambda i: (i / 5).ceil() ** -1.0,
    "one block": lambda i: torch.where(i <= 12, 1.0, 0.1 * i**-0.5),
    "rank 10": lambda i: torch.where(i <= 10, 1 / i, 0.0),
    "rank 30": lambda i: torch.where(i <= 30, 1 / i, 0.0),
    "flat": torch.ones_like,
    "zero": torch.zeros_like,
    "an outlier": lambda i: torch.where(i == 1, 1e3, i**-0.5),
}


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def made(m: int, n: int, spectrum: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return a matrix and its singular values."""
    generator, k = torch.Generator().manual_seed(seed), min(m, n)
    values = SPECTRA[spectrum](torch.arange(1, k + 1, dtype=torch.float64))
    return (orthonormal(m, k, generator) * values) @ orthonormal(n, k, generator).mT, values


def sine(one: Tensor, other: Tensor) -> float:
    """Return the sine of the largest angle between the spans of orthonormal columns."""
    one, other = one.double(), other.double()
    return float(torch.linalg.matrix_norm(other - one @ (one.mT @ other), 2))


def check(matrix: Tensor, found: object, k: int, tolerance: float = 2e-6) -> None:
    """Hold triplets to the decomposition of a matrix in float64."""
    matrix = matrix.double()
    left, values, right = found.left.double(), found.values.double(), found.right.double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert left.shape == (matrix.shape[0], k)
    assert right.shape == (k, matrix.shape[1])
    identity = torch.eye(k, dtype=torch.float64)
    assert torch.allclose(left.mT @ left, identity, atol=2e-6)
    assert torch.allclose(right @ right.mT, identity, atol=2e-6)
    assert torch.allclose(values, s[:k], atol=1e-6 * float(s[0]), rtol=0)
    tail = float(s[k:].square().sum())
    error = float((matrix - (left * values) @ right).square().sum())
    assert error <= tail * (1 + 1e-5) + 1e-11 * float(s.square().sum())
    if 0 < k < len(s) and float(s[k - 1] ** 2 - s[k] ** 2) > 1e-5 * float(s[k - 1] ** 2) and s[k - 1] > 1e-4 * s[0]:
        assert sine(left, u[:, :k]) <= tolerance
        assert sine(right.mT, v[:k].mT) <= tolerance


@settings(max_examples=50)
@given(sides, sides, st.sampled_from(sorted(SPECTRA)), st.integers(0, 24), st.integers(0, 10**6))
def test_equals_the_svd(m: int, n: int, spectrum: str, k: int, seed: int):
    matrix, values = made(m, n, spectrum, seed)
    found = leading_svd([matrix], k, seed=seed)
    check(matrix, found, k)
    errors = values.square().sum() - torch.cat((values.new_zeros(1), values.square().cumsum(0)))
    assert torch.allclose(found.errors[: k + 1], errors[: k + 1], atol=1e-9 * max(1.0, float(errors[0])), rtol=0)


@settings(max_examples=15)
@given(sides, sides, sides, st.sampled_from(["root", "inverse", "pairs", "rank 10"]), st.integers(1, 16), st.booleans())
def test_a_product_is_decomposed(m: int, n: int, inner: int, spectrum: str, k: int, single: bool):
    one, two = made(m, inner, spectrum, 0)[0], made(inner, n, "root", 1)[0]
    dtype = torch.float32 if single else torch.float64
    one, two = one.to(dtype), two.to(dtype)
    found = leading_svd([one, two], k)
    assert found.left.dtype == dtype
    check(one.double() @ two.double(), found, k)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (512, 512)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_random_matrices(shape: tuple[int, int], dtype: torch.dtype):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    found = leading_svd([matrix], 12)
    assert found.method == "filtered"
    assert found.values.dtype == torch.promote_types(dtype, torch.float32)
    check(matrix, found, 12)


def test_which_way_is_taken():
    def method(spectrum: str, k: int, m: int = 300, n: int = 400) -> str:
        return leading_svd([made(m, n, spectrum, 0)[0]], k).method

    assert method("root", 16) == method("pairs", 15) == method("rank 30", 16) == "filtered"
    assert method("flat", 16) == method("zero", 16) == method("rank 10", 16) == "gram"
    assert method("root", 120) == method("root", 16, 200) == "gram"
    assert method("root", 16, 60) == "exact"


@pytest.mark.parametrize("scale", [1e-150, 1e-42, 1e-25, 1e25, 1e150])
def test_scales(scale: float):
    matrix, values = made(300, 280, "root", 0)
    found = leading_svd([scale * matrix], 8)
    check(matrix, leading_svd([matrix], 8), 8)
    assert torch.allclose(found.values / scale, values[:8], rtol=1e-9)
    if 1e-45 < scale < 1e38:
        narrow = leading_svd([(scale * matrix).float()], 8)
        assert torch.allclose(narrow.values.double() / scale, values[:8], rtol=1e-2 if scale < 1e-38 else 1e-5)


def test_same_seed_same_bits():
    matrix = made(300, 400, "root", 0)[0].float()
    one, two, other = (leading_svd([matrix], 16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.left, two.left)
    assert torch.equal(one.right, two.right)
    assert sine(one.left, other.left) < 1e-6


@pytest.mark.parametrize(
    ("factors", "rank", "message"),
    [
        ([], 1, "needs matrices"),
        ([torch.ones(3)], 1, "needs matrices"),
        ([torch.ones(3, 4), torch.ones(3, 4)], 1, "factors that multiply"),
        ([torch.ones(3, 4)], -1, "must not be negative"),
        ([torch.ones(3, 4, dtype=torch.int64)], 1, "floating"),
        ([torch.tensor([[1.0, math.nan]])], 1, "NaN or Inf"),
        ([torch.ones(3, 2), torch.tensor([[1.0], [math.inf]])], 1, "NaN or Inf"),
    ],
)
def test_refused_in_one_sentence(factors: list[Tensor], rank: int, message: str):
    with pytest.raises(EckartError, match=message) as caught:
        leading_svd(factors, rank)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 300), st.integers(0, 40), st.integers(0, 10**6))
def test_upper_gram_sums(n: int, rows: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(rows, n, generator=generator, dtype=torch.float64) for _ in range(2)]
    total = torch.zeros(n, n, dtype=torch.float64)
    for part in parts:
        add_upper_gram(total, part)
    assert torch.allclose(mirror_upper(total), sum(part.mT @ part for part in parts))
