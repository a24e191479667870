"""Some rows and columns of a map are those of its matrix, and are computed without the others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from eckart.fit.quantize import Coding, quantize
from eckart.maps import Dense, LinearMap, LowRank, Product, Scaled, Sum, sliced
from eckart.testing.case import Case, normal
from eckart.testing.cases import cases


@given(st.sampled_from(cases()), st.integers(0, 10**6), st.sampled_from(["rows", "columns", "both", "neither"]))
def test_a_slice_of_every_map_is_that_of_its_matrix(case: Case, seed: int, side: str):
    rows, columns = (places(size, seed + axis) for axis, size in enumerate(case.map.shape))
    rows = rows if side in ("rows", "both") else None
    columns = columns if side in ("columns", "both") else None
    wanted = case.matrix if rows is None else case.matrix[rows.long()]
    wanted = wanted if columns is None else wanted[:, columns.long()]
    got = sliced(case.map, rows, columns)
    assert got.shape == tuple(wanted.shape)
    x = normal(3, got.shape[1], seed=seed).to(case.map.dtype)
    torch.testing.assert_close(got(x).double(), x.double() @ wanted.mT, atol=1e-4, rtol=1e-4)


def places(size: int, seed: int) -> torch.Tensor:
    """A few places below a size, ascending."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, size + 1, (), generator=generator))
    return torch.randperm(size, generator=generator)[:count].sort().values.to(torch.int32)


MAPS = {
    "dense": Dense(normal(40, 30)),
    "low rank": LowRank(normal(40, 4), normal(4, 30)),
    "scaled sum": Scaled(Sum((Dense(normal(40, 30)), LowRank(normal(40, 4), normal(4, 30)))), 0.5),
    "product": Product((Dense(normal(40, 8)), Dense(normal(8, 30)))),
    "codes": quantize(normal(40, 32), Coding(4, group_size=16)),
}


@pytest.mark.parametrize("name", MAPS)
def test_what_is_left_out_is_not_computed(name: str):
    map_, rows = MAPS[name], torch.arange(0, 40, 10)
    x = normal(5, map_.shape[1]).to(map_.dtype)
    assert operations(sliced(map_, rows), x) < operations(map_, x)


def operations(map_: LinearMap, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        map_(x)
    return counter.get_total_flops()
