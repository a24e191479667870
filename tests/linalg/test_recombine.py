"""The SVD of a sum of products of thin factors is that of its dense matrix, however the factors are conditioned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.linalg import svd_of_product


def test_nothing_is_refused():
    from eckart import EckartError

    with pytest.raises(EckartError, match="at least one pair"):
        svd_of_product([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(40, 30, 3), (400, 300, 16), (9, 50, 8), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5, 1e9])
def test_it_is_that_of_the_dense_product(dtype: torch.dtype, size: tuple[int, int, int], condition: float):
    m, n, r = size
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -torch.tensor(condition).log10(), r, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
    up = (torch.randn(m, r, generator=generator, dtype=torch.float64) * scale @ mix).to(dtype)
    down = torch.randn(r, n, generator=generator, dtype=torch.float64).to(dtype)
    other = up[:, :1] * 0.5, down[:1] + 1
    dense = up.double() @ down.double() + other[0].double() @ other[1].double()
    found = svd_of_product([(up, down), other])
    assert found.values.dtype == dtype
    eps = torch.finfo(dtype).eps
    values = torch.linalg.svdvals(dense)
    count = min(found.rank, len(values))
    assert torch.allclose(found.values[:count].double(), values[:count], rtol=0, atol=50 * eps * float(values[0]))
    assert float((found.dense().double() - dense).norm()) <= 50 * eps * float(dense.norm())
    for side in (found.left.mT[:count], found.right[:count]):
        gram = side.double() @ side.double().mT
        assert float((gram - torch.eye(count, dtype=torch.float64)).abs().max()) <= 50 * eps
    assert torch.allclose(found.errors[0], dense.square().sum(), rtol=1e-9 if dtype == torch.float64 else 1e-5)
    thin = svd_of_product([(up, down), other], 2)
    assert thin.rank == min(2, found.rank)


def test_zero_factors_as_adapters_start_with():
    found = svd_of_product([(torch.zeros(100, 4), torch.randn(4, 90))])
    assert torch.equal(found.values, torch.zeros(4))
    assert bool(found.dense().isfinite().all())


def columns(m: int, r: int, kind: str, exponent: float, generator: torch.Generator) -> Tensor:
    """Return columns (m, r) float64 whose condition is 10^exponent, or not finite."""
    drawn = torch.randn(m, r, generator=generator, dtype=torch.float64)
    falling = torch.logspace(0, -exponent, r, dtype=torch.float64)
    if kind == "falling":
        mix = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
        return torch.linalg.qr(drawn).Q * falling[: min(m, r)] @ mix[: min(m, r)]
    if kind == "scaled":
        return drawn * falling
    if kind == "near":
        drawn[:, -1] = drawn[:, 0] + 10**-exponent * torch.randn(m, generator=generator, dtype=torch.float64)
    elif kind == "deficient":
        drawn[:, r // 2 :] = drawn[:, : r - r // 2]
    return drawn * (kind != "zero") * 10 ** (exponent if kind == "large" else 0)


KINDS = st.sampled_from(["falling", "scaled", "near", "deficient", "zero", "large"])
DTYPES = st.sampled_from([torch.float32, torch.float64])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 120), st.integers(1, 120), st.integers(1, 12), KINDS, KINDS,
    st.floats(0, 12), st.floats(0, 12), DTYPES, st.integers(0, 1 << 16),
)  # fmt: skip
def test_nearly_dependent_columns_lose_nothing(m, n, r, one, other, a, b, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    up, down = columns(m, r, one, a, generator).to(dtype), columns(n, r, other, b, generator).mT.to(dtype)
    found, eps = svd_of_product([(up, down)]), torch.finfo(dtype).eps
    left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.mT.double())
    values = torch.linalg.svdvals(left.R @ right.R.mT)
    size = float(values[0])
    # a product of float64 factors is itself no better than what its terms are
    terms = float(up.double().norm() * down.double().norm())
    allowed = 100 * (eps * size + 2.3e-16 * terms)
    assert found.rank == len(values)
    assert float((found.values.double() - values).abs().max()) <= allowed
    rebuilt = found.left.double() * found.values.double() @ found.right.double()
    assert float((rebuilt - up.double() @ down.double()).norm()) <= allowed
    for side in (found.left.mT.double(), found.right.double()):
        assert float((side @ side.mT - torch.eye(len(side), dtype=torch.float64)).abs().max()) <= 100 * eps
