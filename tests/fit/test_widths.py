"""Codes of several widths: the best widths by brute force, budgets, and descent that never raises the error."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.errors import EckartError
from eckart.fit import Coding, Metric, error_of
from eckart.fit.descent import descend
from eckart.fit.quantize import quantize
from eckart.fit.widths import coded_rows, row_widths, widths_family
from eckart.maps import BITS, Dense, Interleaved, Quantized

CODINGS = [Coding(bits, 4, symmetric=True) for bits in (2, 3, 5)]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, seed: int) -> torch.Tensor:
    x = normal(40, n, seed=seed) @ normal(n, n, seed=seed + 1)
    return x.mT @ x / 40


def rare(m: int) -> torch.Tensor:
    """Return the weights of rows of which each matters half as much as the one before."""
    return 0.5 ** torch.arange(m, dtype=torch.float64)


@given(st.integers(1, 5), st.integers(0, 500), st.integers(0, 15))
def test_widths_are_within_one_step_of_the_best(m: int, seed: int, spare: int):
    bits = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    errors = normal(m, 3, seed=seed).abs().sort(dim=1, descending=True).values
    total = 2 * m + spare
    found = row_widths(errors, bits, total)
    assert float(bits[found].sum()) <= total
    ways = [torch.tensor(way) for way in itertools.product(range(3), repeat=m)]
    rows = torch.arange(m)
    best = min(float(errors[rows, way].sum()) for way in ways if float(bits[way].sum()) <= total)
    # The relaxation is off by less than one upgrade of one row.
    step = float((errors[:, :-1] - errors[:, 1:]).max()) + float((errors[:, 0] - errors[:, 2]).max())
    assert float(errors[rows, found].sum()) <= best + step


def test_rows_that_matter_more_get_more_bits_and_less_error():
    weight, metric = normal(24, 8, seed=0), Metric(inputs=moment(8, 1), outputs=rare(24))
    family = widths_family(CODINGS)
    map_ = family.fitter(weight, metric)(300)
    assert isinstance(map_, Interleaved)
    widths = torch.tensor([part.bits for part in map_.maps])[map_.which.long()]
    assert widths[:6].min() > widths[-6:].max()
    even = quantize(weight, CODINGS[1], metric.inputs, axis="rows").to(torch.float64)
    assert error_of(weight, map_.dense(), metric) < 0.2 * error_of(weight, even.dense(), metric)


@pytest.mark.parametrize("size", [200, 325, 400, 500])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_size_is_a_promise_of_bytes(size, symmetric):
    weight, metric = normal(20, 7, seed=2), Metric(inputs=moment(7, 3), outputs=rare(20))
    family = widths_family([Coding(bits, 4, symmetric=symmetric) for bits in BITS])
    map_ = family.fit(weight, metric, size).to(torch.float16)
    assert map_.numbers == family.numbers((20, 7), size) == 140
    assert map_.nbytes <= family.nbytes((20, 7), size, 2) <= map_.nbytes + 2 * 20
    assert map_.to(torch.float32).dense().equal(family.fit(weight, metric, size).to(torch.float32).dense())


def test_one_width_for_all_is_plain_codes():
    weight, metric = normal(6, 8, seed=4), Metric(inputs=moment(8, 5))
    assert isinstance(widths_family(CODINGS).fitter(weight, metric)(200), Quantized)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 300), st.sampled_from(["none", "diagonal", "full"]))
def test_descent_never_raises_the_error(m: int, n: int, seed: int, kind: str):
    outputs = {"none": None, "diagonal": rare(m), "full": moment(m, seed + 9)}[kind]
    weight, metric = normal(m, n, seed=seed), Metric(inputs=moment(n, seed + 4), outputs=outputs)
    for symmetric in (False, True):
        start = quantize(weight, Coding(3, 4, symmetric=symmetric), metric.inputs, axis="rows", dtype=torch.bfloat16)
        start = start.to(torch.float64)
        found = descend(weight, metric, start)
        assert found.spec() == start.spec()
        before, after = (error_of(weight, map_.dense(), metric) for map_ in (start, found))
        assert after <= before * (1 + 2e-2) + 1e-12  # scales are rounded to 8 bits


def test_descent_gains_most_where_rows_act_on_each_other():
    weight, metric = normal(32, 24, seed=6), Metric(inputs=moment(24, 7), outputs=moment(32, 8))
    maps, _ = coded_rows(weight, metric, [Coding(3, 24)])
    start = maps[0].to(torch.float64)
    before, after = (error_of(weight, map_.dense(), metric) for map_ in (start, descend(weight, metric, start)))
    assert after < 0.7 * before


def test_descent_keeps_widths_and_leaves_other_maps_alone():
    weight, metric = normal(12, 8, seed=9), Metric(inputs=moment(8, 10), outputs=rare(12))
    start = widths_family(CODINGS).fitter(weight, metric)(300)
    found = descend(weight, metric, start)
    assert found.spec() == start.spec()
    assert torch.equal(found.which, start.which)
    assert descend(weight, metric, Dense(weight)) == Dense(weight)
    assert descend(weight, Metric(), start) == start


def test_tables_of_levels_are_refused():
    with pytest.raises(EckartError, match="uniform levels, got levels=learned"):
        widths_family([Coding(bits, 4, levels="learned") for bits in (2, 3)])
