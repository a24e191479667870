"""Selection finds the k-th smallest number exactly, however the numbers are ordered."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.linalg import kth_smallest, largest_in_rows
from eckart.linalg.selection import FEW, STRIDE


@given(st.integers(0, 1000), st.integers(1, 3 * FEW), st.floats(0, 1), st.booleans())
def test_it_is_what_sorting_finds(seed: int, count: int, share: float, tied: bool):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    values = (3 * values).round() if tied else values
    k = min(count, 1 + int(share * count))
    assert kth_smallest(values, k) == values.sort().values[k - 1]


@pytest.mark.parametrize("k", [1, FEW // 3, FEW, 2 * FEW])
def test_an_order_that_misleads_the_sample_changes_nothing(k: int):
    values = torch.arange(2 * FEW).float()
    values[::STRIDE] = -1.0  # all that the sample sees
    assert kth_smallest(values, k) == values.sort().values[k - 1]


@given(
    st.integers(0, 1000),
    st.integers(0, 6),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(["distinct", "tied", "mostly zero", "infinite"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_largest_of_rows_are_those_that_sorting_puts_first(
    seed: int, m: int, n: int, share: float, kind: str, dtype: torch.dtype
):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if kind == "tied":
        sizes = (2 * sizes).round()
    elif kind == "mostly zero":
        sizes = sizes.clamp_min(1)
    elif kind == "infinite":
        sizes[:, : n // 2] = torch.inf
    sizes, count = sizes.to(dtype), round(share * n)
    kept = largest_in_rows(sizes, count)
    assert kept.sum(1).tolist() == [count] * m
    for row, chosen in zip(sizes, kept, strict=True):
        assert row[chosen].sort(descending=True).values.equal(row.sort(descending=True).values[:count])


def test_rows_without_numbers_still_have_as_many_chosen():
    sizes = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert largest_in_rows(sizes, 2).sum(1).tolist() == [2, 2]
