"""Selection finds the k-th smallest number exactly, however the numbers are ordered."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.linalg import kth_smallest
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
