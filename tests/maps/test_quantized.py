"""What is particular to matrices of codes: packing without gaps, true bytes, numbers that are codes, look-ups."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.errors import EckartError
from eckart.hosts import host
from eckart.maps import BITS, Product, Quantized, pack, unpack
from eckart.testing import cases


def random_map(m: int, n: int, bits: int, group: int, *, zero: bool = True, levels: bool = False) -> Quantized:
    generator = torch.Generator().manual_seed(m + 31 * n + bits)
    groups = -(-n // group)
    codes = pack(torch.randint(2**bits, (m, n), generator=generator), bits)
    return Quantized(
        codes,
        torch.rand(m, groups, generator=generator) + 0.1,
        torch.randn(m, groups, generator=generator) if zero else None,
        torch.randn(m, 2**bits, generator=generator) if levels else None,
        n,
        bits,
        group,
    )


@given(st.integers(0, 5), st.integers(0, 40), st.sampled_from(BITS), st.integers(0, 1000))
def test_codes_are_packed_without_gaps_and_come_back(m, n, bits, seed):
    codes = torch.randint(2**bits, (m, n), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    data = pack(codes, bits)
    assert data.dtype == torch.uint8
    assert data.shape == (m, -(-n * bits // 8))
    assert torch.equal(unpack(data, n, bits), codes)
    # one whole number per row, code j at bit bits j: what the docstring states
    for row, packed in zip(codes.tolist(), data.tolist(), strict=True):
        stream = sum(code << (bits * j) for j, code in enumerate(row))
        assert stream == int.from_bytes(bytes(packed), "little")


def test_numbers_are_codes_and_bytes_are_true():
    map_ = random_map(6, 50, 3, 16).to(torch.float16)
    assert map_.numbers == 300
    assert map_.nbytes == 6 * 19 + 2 * (6 * 4 * 2)
    both = Product((random_map(8, 4, 4, 4), random_map(4, 9, 4, 16)))
    assert both.numbers == 8 * 4 + 4 * 9
    assert "300 numbers" in repr(map_)


@pytest.mark.parametrize("levels", [False, True])
def test_rows_are_looked_up_without_the_others(levels):
    map_ = random_map(11, 7, 4, 3, levels=levels)
    rows = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(map_.select(rows), map_.dense()[rows])


def test_bits_behind_the_last_code_are_refused():
    map_ = random_map(2, 3, 3, 3)
    map_.validate()
    map_.codes[1, 1] |= 0x80
    with pytest.raises(EckartError, match="bits set behind the last code of a row"):
        map_.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "got 7 bits"),
        ({"group_size": 0}, "groups of 0"),
        ({"axis": "both"}, "axis 'both'"),
        ({"width": 10}, "Quantized codes"),
        ({"group_size": 2}, "Quantized scale"),
        ({"codes": torch.zeros(2, 4)}, "codes of shape"),
        ({"levels": torch.zeros(2, 8)}, "Quantized levels"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {"codes": torch.zeros(2, 4, dtype=torch.uint8), "scale": torch.ones(2, 3), "zero": None, "levels": None}
    with pytest.raises(EckartError, match=message):
        Quantized(**{**parts, "width": 7, "bits": 4, "group_size": 3, **change})


def test_a_host_follows_its_numbers_and_leaves_its_dense_weight_out_of_copies():
    map_ = random_map(6, 9, 4, 4)
    module, x = host(map_.apply(torch.clone)), torch.randn(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(module(x), map_(x))
        assert module._decoding is not None
        assert copy.deepcopy(module)._decoding is None
        module.zero.add_(1)
        torch.testing.assert_close(module(x), map_(x) + x.sum(-1, keepdim=True))
        module.codes.zero_()
        torch.testing.assert_close(module(x), module.held_map()(x))
    module(x).sum().backward()
    assert module._decoding is None
    assert module.scale.grad.abs().sum() > 0


def test_large_matrices_are_not_kept_dense():
    module = host(random_map(1100, 1000, 4, 128))
    with torch.no_grad():
        module(torch.randn(1, 1000))
    assert module._decoding is None


def test_every_kind_has_cases():
    held = [case.map for case in cases("Quantized")]
    assert {map_.bits for map_ in held} == set(BITS)
    assert {map_.axis for map_ in held} == {"rows", "columns"}
    assert {(map_.zero is None, map_.levels is None) for map_ in held} == {(a, b) for a in (0, 1) for b in (0, 1)}


def test_a_host_made_for_inference_computes():
    map_ = random_map(6, 9, 4, 4)
    with torch.inference_mode():
        module = host(map_.apply(torch.clone))
        x = torch.randn(2, 9)
        torch.testing.assert_close(module(x), map_(x))


@given(st.integers(1, 6), st.integers(1, 30), st.sampled_from(BITS), st.integers(1, 9), st.booleans(), st.data())
def test_leading_codes_are_what_they_were_and_clean(m, n, bits, group, levels, data):
    map_ = random_map(m, n, bits, group, levels=levels)
    rows, width = data.draw(st.integers(0, m)), data.draw(st.integers(0, n))
    first = map_.leading(rows, width)
    first.validate()
    assert first.shape == (rows, width)
    assert torch.equal(first.dense(), map_.dense()[:rows, :width])
    assert torch.equal(map_.T.leading(rows, width).dense(), map_.dense().mT[:width, :rows])
