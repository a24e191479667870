"""Fitted maps stored as codes: sizes known beforehand, errors below those of naive rounding, true factors."""

import pytest
import torch

from eckart.errors import EckartError
from eckart.fit import Metric, error_of, metric, regress
from eckart.fit.coded import coded, coded_blank, coded_shared
from eckart.fit.components import down_codes, up_codes
from eckart.fit.dictionary import closed_form_learner
from eckart.fit.families import dictionary_family, sparse_plus_lowrank_family
from eckart.fit.quantize import Coding, quantize
from eckart.fit.shared import split_rows
from eckart.maps import Dense, LinearMap, LowRank, Product, Quantized, pivot

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(m: int, n: int, seed: int = 0, shifted: bool = False) -> tuple[torch.Tensor, Metric]:
    weight, inputs = normal(m, n, seed=seed), normal(400, n, seed=seed + 1) @ normal(n, n, seed=seed + 2)
    g = inputs.mT @ inputs / 400
    if not shifted:
        return weight, metric(g, outputs=normal(m, seed=seed + 3) ** 2)
    seen = inputs + 0.3 * inputs.std() * normal(400, n, seed=seed + 4)
    return weight, metric(g, shifted=seen.mT @ seen / 400, cross=inputs.mT @ seen / 400)


def fitted(kind: str, weight: torch.Tensor, close: Metric) -> LinearMap:
    factors = regress(weight, close).factors(7)
    made = {
        "dense": lambda: Dense(weight),
        "lowrank": lambda: factors,
        "rows": lambda: pivot(factors, "rows"),
        "columns": lambda: pivot(factors, "columns"),
        "dictionary": lambda: dictionary_family(closed_form_learner(0.5)).fit(weight, close, 10),
        "sparse": lambda: sparse_plus_lowrank_family(iterations=2).fit(weight, close, 9),
        "rank 0": lambda: LowRank(torch.zeros(weight.shape[0], 0), torch.zeros(0, weight.shape[1])),
    }
    return made[kind]()


KINDS = ("dense", "lowrank", "rows", "columns", "dictionary", "sparse", "rank 0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(30, 22), (22, 30)])
def test_sizes_are_known_beforehand_and_numbers_stay(kind, shape):
    weight, close = problem(*shape)
    coding, map_ = Coding(4, 16), fitted(kind, weight, close)
    found = coded(map_, weight, close, coding, torch.float16)
    blank = coded_blank(map_.to(device="meta"), coding, torch.float16)
    assert found.spec() == blank.spec()
    assert found.numbers == map_.numbers
    assert found.nbytes == blank.nbytes
    assert found.dtype == torch.float16
    found.validate()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shifted", [False, True])
def test_eight_bits_change_next_to_nothing(kind, shifted):
    weight, close = problem(26, 24, shifted=shifted)
    map_ = fitted(kind, weight, close)
    before = error_of(weight, map_.to(F64).dense(), close)
    after = error_of(weight, coded(map_, weight, close, Coding(8, 32), F64).dense(), close)
    assert after <= 1.01 * before + 1e-4 * error_of(weight, torch.zeros_like(weight), close)


@pytest.mark.parametrize("kind", ["lowrank", "rows", "columns"])
@pytest.mark.parametrize("bits", [3, 4])
def test_factors_of_few_bits_are_better_refitted_and_fed_back(kind, bits):
    """Against rounding each tensor to nearest by itself, over several layers."""
    found = {"naive": 0.0, "coded": 0.0, "without codes": 0.0}
    for seed in range(5):
        weight, close = problem(40, 36, seed=10 * seed)
        map_ = fitted(kind, weight, close)

        def rounded(t: torch.Tensor) -> torch.Tensor:
            return quantize(t, Coding(bits, 16, "nearest"), dtype=F64).dense() if t.is_floating_point() else t

        for name, made in (
            ("naive", map_.apply(rounded)),
            ("coded", coded(map_, weight, close, Coding(bits, 16), F64)),
            ("without codes", map_),
        ):
            found[name] += error_of(weight, made.dense(), close)
    assert found["without codes"] < found["coded"]
    assert found["coded"] - found["without codes"] < 0.8 * (found["naive"] - found["without codes"])


def test_the_balance_does_not_depend_on_how_a_product_is_split():
    weight, close = problem(30, 20)
    factors = regress(weight, close).factors(6)
    skewed = torch.logspace(-3, 3, 6, dtype=F64)
    other = LowRank(factors.up * skewed, factors.down / skewed[:, None])
    coding = Coding(4, 64, symmetric=True)
    one, two = (coded(f, weight, close, coding, F64).dense() for f in (factors, other))
    torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


def test_balanced_columns_beat_unbalanced_ones_where_they_share_scales():
    """Rows of the up factor share a scale across its columns: the noise is least where each column is as large as what
    it is multiplied by.
    """
    up, std = normal(200, 8), torch.logspace(0, -1.5, 8, dtype=F64)
    noise = {}
    for power in (0.0, 0.25, 0.5, 0.75, 1.0):  # 0.5 is the balance
        scale = std**power
        factor = quantize(up * scale, Coding(4, 8, "nearest", clip=False), dtype=F64)
        assert factor.axis == "rows"
        noise[power] = float(((up * scale - factor.dense()) / scale * std).square().sum())
    assert min(noise, key=noise.__getitem__) == 0.5


def test_what_maps_become():
    weight, close = problem(20, 16)
    made = {kind: coded(fitted(kind, weight, close), weight, close, Coding(4), torch.float32) for kind in KINDS}
    assert isinstance(made["dense"], Quantized)
    assert isinstance(made["lowrank"], Product)
    assert all(isinstance(part, Quantized) for part in made["lowrank"].maps)
    assert isinstance(made["rank 0"], LowRank)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_components_of_codes_are_good_at_every_rank(shifted, table):
    weight, close = problem(24, 20, shifted=shifted)
    found, coding = regress(weight, close), Coding(8, 8)
    ups = up_codes(found.factors(12), close, coding, F64, table=table)
    downs = down_codes(weight, ups, close, coding, F64, table=table)
    assert ups.codes.shape == ((24, 12) if table else (12, 24))
    up = ups.dense() if table else ups.dense().mT
    for rank in range(1, 13):
        both = up[:, :rank] @ downs.dense()[:rank]
        assert error_of(weight, both, close) < 1.02 * error_of(weight, found.factors(rank).dense(), close)


def test_down_factors_make_up_for_the_rounding_of_those_before():
    """At 2 bits: the error of every number of components is below that of rounding both factors by themselves."""
    weight, close = problem(24, 20)
    factors, coding = regress(weight, close).factors(12), Coding(2, 8)
    ups = up_codes(factors, close, coding, F64, table=False)
    downs = down_codes(weight, ups, close, coding, F64, table=False)
    plain = [quantize(part, coding, axis="rows", dtype=F64).dense() for part in (factors.up.mT, factors.down)]
    for rank in (4, 8, 12):
        naive = error_of(weight, plain[0][:rank].mT @ plain[1][:rank], close)
        assert error_of(weight, ups.dense()[:rank].mT @ downs.dense()[:rank], close) < naive


@pytest.mark.parametrize("kind", ["lowrank", "dictionary"])
def test_a_shared_factor_of_codes_is_one_and_loses_little(kind):
    parts = [problem(18, 20, seed=seed) for seed in (0, 10)]
    weights, metrics = [w for w, _ in parts], [close for _, close in parts]
    common = metric(sum(close.inputs for close in metrics))
    whole = fitted(kind, torch.cat(weights), common)
    maps = split_rows(whole, [18, 18])
    made = coded_shared(maps, weights, metrics, Coding(8, 8), torch.float32)
    assert made[0].maps[1] is made[1].maps[1]
    assert sum(map_.numbers for map_ in made) == sum(map_.numbers for map_ in maps)
    before, after = (
        sum(
            error_of(w, m.to(F64).dense(), Metric(close.inputs))
            for w, m, close in zip(weights, each, metrics, strict=True)
        )
        for each in (maps, made)
    )
    assert after < 1.02 * before
    with pytest.raises(EckartError, match="share the right factor of low-rank maps and of dictionaries, not"):
        coded_shared([Dense(w) for w in weights], weights, metrics, Coding(8, 8), torch.float32)
