"""Budgets over bytes: met within one per cent where they can be, and refused in one sentence where not."""

import json
import re

import pytest
from safetensors.torch import load_file

import eckart
from eckart.errors import EckartError
from eckart.methods.compress.limits import parse_ratio, parse_size

# How small the demonstration model can become by methods that leave its embedding alone, and with it.
DENSE = 4 * 260_032


@pytest.mark.parametrize(
    ("method", "size", "settings"),
    [
        ("svd", "0.78MB", {}),
        ("svd", 620_000, {"storage": "pivoted"}),
        ("welore", 620_000, {}),
        ("lord", "600KiB", {}),
        ("rocket", 780_000, {}),
        ("eckart", 620_000, {}),
        ("eckart-mixed", "0.78MB", {}),
    ],
)
def test_a_byte_budget_is_met_on_disk(size, method, settings, demo, quick, tmp_path):
    outcome = eckart.compress(demo, tmp_path / "out", bytes=size, **quick(method, **settings))
    stored = sum(t.nbytes for t in load_file(outcome.out / "model.safetensors").values())
    assert 0.99 * parse_size(size) <= stored <= parse_size(size)
    assert stored == outcome.plan.bytes_after == outcome.plan.spent.after
    assert outcome.plan.spent.limit == f"bytes {parse_size(size):,}"
    assert (outcome.plan.keep, outcome.plan.spent.before) == (None, DENSE)
    assert json.loads((outcome.out / "eckart.json").read_text())["settings"]["bytes"] == parse_size(size)
    assert f"| bytes | `{parse_size(size)}` |" in (outcome.out / "README.md").read_text()


def test_a_budget_beyond_the_model_changes_nothing(demo, tmp_path):
    outcome = eckart.compress(demo, tmp_path / "out", method="svd", bytes="1GB")
    assert outcome.plan.bytes_after == DENSE


def test_no_layer_takes_more_bytes_than_before(demo, tmp_path):
    plan = eckart.plan(demo, method="svd", bytes=DENSE - 4, settings={"storage": "pivoted"})
    assert all(layer.nbytes <= 4 * layer.dense_numbers for layer in plan.layers)


def test_an_impossible_byte_budget_says_what_is_possible(demo):
    with pytest.raises(
        EckartError, match=r"bytes 100,000 of 1,040,128 bytes cannot be met: 133,888 bytes lie"
    ) as caught:
        eckart.plan(demo, method="svd", bytes="100KB")
    least = int(re.search(r"ask for more than ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    assert eckart.plan(demo, method="svd", bytes=least).bytes_after == least
    with pytest.raises(EckartError, match="cannot be met"):
        eckart.plan(demo, method="svd", bytes=least - 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("20MB", 20_000_000), ("20MiB", 20 << 20), ("1.5 GB", 1_500_000_000), ("3kib", 3072), ("7", 7), (7, 7), ("8B", 8)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "20XB", "-3MB", "1e6", "20 MB!", "nan", "0", 0, -1, 2.5, True, "0.1B"])
def test_what_is_no_size(text):
    with pytest.raises(EckartError, match=r"bytes must be a size such as 20MB, 1\.5GiB or 800000, got "):
        parse_size(text)


@pytest.mark.parametrize(("text", "share"), [("0.7x", 0.7), ("1x", 1.0), (".5x", 0.5), (" 0.25 x ", 0.25)])
def test_ratios(text, share):
    assert parse_ratio("latency", text) == share


@pytest.mark.parametrize("text", ["0.7", "x", "1.1x", "0x", "-0.5x", "70%", 0.7, None, "0.7xx"])
def test_what_is_no_ratio(text):
    with pytest.raises(EckartError, match=r"latency is a share of what the dense model takes, .* as 0\.7x; got "):
        parse_ratio("latency", text)


def test_there_is_one_budget(demo):
    with pytest.raises(
        EckartError, match="keep and bytes are given, but a run has one budget; give one of keep, bytes"
    ):
        eckart.plan(demo, method="svd", keep=0.5, bytes="1MB")
    assert eckart.plan(demo, method="svd").keep == 0.6
