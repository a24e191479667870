"""Budgets over bytes, operations and time: met within one per cent, or refused in one sentence."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import eckart
from eckart.budget import latency
from eckart.errors import EckartError
from eckart.hosts import EmbeddingHost, Host, map_of
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
        ("eckart-mixed", "0.15MB", {}),
        ("svd", 150_000, {"bits": 4, "embeddings": True}),
        ("svd-llm-v2", 620_000, {}),
        ("basis-sharing", 620_000, {}),
        ("modegpt", 780_000, {}),
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


def test_slicing_meets_a_byte_budget_in_steps_of_whole_coordinates(demo, quick, tmp_path):
    outcome = eckart.compress(demo, tmp_path / "out", bytes="0.78MB", **quick("slicegpt"))
    stored = sum(t.nbytes for t in load_file(outcome.out / "model.safetensors").values())
    assert 0.8 * 780_000 <= stored <= 780_000
    assert stored == outcome.plan.bytes_after == outcome.plan.spent.after == outcome.checked.nbytes
    assert outcome.plan.keep is None


@pytest.mark.parametrize(
    ("method", "budget", "words"),
    [
        ("rtn", {"bytes": "0.5MB"}, "so keep must be 1, got bytes 500,000"),
        ("zs-svd", {"bytes": "0.5MB"}, "by what they count in parameters; give keep, not bytes 500,000"),
        ("basis-sharing", {"latency": "0.7x"}, "latency of basis-sharing cannot be told beforehand"),
        ("slicegpt", {"flops": "0.7x"}, "flops of slicegpt cannot be told beforehand"),
        ("modegpt", {"latency": "0.7x"}, "latency of modegpt cannot be told beforehand"),
        (
            "eckart-mixed",
            {"bytes": "0.2MB", "settings": {"period": 4, "kronecker": True, "neurons": "always"}},
            "chooses the bits of every row, not among N:4, kronecker, fewer hidden units; leave those settings out",
        ),
        ("svd", {"flops": "0.7x", "settings": {"bits": 4}}, "flops of codes, which bits asks for, cannot be told"),
    ],
)
def test_what_a_method_cannot_be_held_to_is_refused(method, budget, words, demo):
    with pytest.raises(EckartError, match=words):
        eckart.plan(demo, method=method, **budget)


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


def operations(folder) -> int:
    """What the linear layers, the head and factored lookups of a model do for one token, from its modules."""

    def inside(module: nn.Module) -> int:
        if isinstance(module, EmbeddingHost):  # its head multiplies by the same table
            return module.held_map().flops(1) + 2 * module.rest.weight.numel()
        if isinstance(module, Host | nn.Linear):
            return map_of(module).flops(1)
        return sum(inside(child) for child in module.children())

    return inside(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(
    ("method", "share", "settings"),
    [
        ("svd", "0.7x", {}),
        ("lord", "0.8x", {}),
        ("eckart", "0.6x", {}),
        ("eckart-mixed", "0.3x", {"neurons": "always", "kronecker": True}),
        ("modegpt", "0.8x", {}),
    ],
)
def test_a_budget_of_operations_is_met(method, share, settings, demo, quick, tmp_path):
    outcome = eckart.compress(demo, tmp_path / "out", flops=share, **quick(method, **settings))
    spent = outcome.plan.spent
    assert spent.limit == f"flops {share}"
    assert spent.before == operations(demo)
    assert spent.after == operations(outcome.out)
    assert 0.99 * parse_ratio("flops", share) <= spent.after / spent.before <= parse_ratio("flops", share)


@pytest.fixture
def times(monkeypatch):
    """Times that a slope decides: an option of size r takes `slope` r / largest of the dense layer's; counts tables."""
    tables = []

    def set_slope(slope: float) -> list:
        def measured(tasks):
            tables.append(sorted(tasks))
            largest = max((int(name.split()[-1]) for name in tasks if name != "dense"), default=1)
            return {name: 1e-4 if name == "dense" else 1e-4 * slope * int(name.split()[-1]) / largest for name in tasks}

        monkeypatch.setattr(latency, "measured", measured)
        return tables

    return set_slope


@pytest.mark.parametrize(
    ("method", "settings"),
    [("svd", {}), ("welore", {}), ("eckart", {}), ("eckart-mixed", {"neurons": "always"})],
)
def test_a_latency_budget_is_met(method, settings, times, demo, quick):
    tables = times(1.25)
    plan = eckart.plan(demo, latency="0.6x", **quick(method, **settings))
    assert 0.59 <= plan.spent.after / plan.spent.before <= 0.6
    assert (plan.spent.limit, plan.spent.unit) == ("latency 0.6x", "microseconds")
    count = len(tables)
    again = eckart.plan(demo, latency="0.6x", **quick(method, **settings))
    assert again == plan
    assert len(tables) == count  # nothing was measured twice


def test_narrow_layers_are_fast_where_no_map_is(demo, quick, monkeypatch):
    """Times of dense layers fall with the units that are left; no map is faster than the dense layer."""

    def measured(tasks):
        sizes = {name: name.rpartition(" ")[::2] for name in tasks}
        narrow = {name: int(size) / 172 for name, (kind, size) in sizes.items() if kind in ("rows", "columns")}
        return {name: 1e-4 * narrow.get(name, 1.0) for name in tasks}

    monkeypatch.setattr(latency, "measured", measured)
    monkeypatch.setattr("eckart.fit.families.SHARES", (0.3,))
    with pytest.raises(EckartError, match="cannot be met"):
        eckart.plan(demo, latency="0.8x", **quick("eckart-mixed", neurons="never"))
    plan = eckart.plan(demo, latency="0.8x", **quick("eckart-mixed"))
    assert plan.spent.after <= 0.8 * plan.spent.before
    assert {row.structure for row in plan.layers} == {"neurons", "dense"}


def test_no_layer_is_slower_than_dense(times, demo):
    times(2.0)
    plan = eckart.plan(demo, method="svd", latency="0.9x")
    for layer in plan.layers:
        m, n = layer.shape
        largest = (m * n - 1) // (m + n)  # takes twice as long as dense, so less than half of it is faster
        assert layer.structure == "dense" or 2.0 * layer.rank / largest < 0.95
    assert {layer.structure for layer in plan.layers} == {"dense", "lowrank"}


def test_nothing_faster_than_dense_means_no_latency_budget(times, demo):
    times(40.0)
    message = r"latency 0\.9x of [\d,]+ microseconds cannot be met: .* ask for more than (1\.000|0\.9\d\d)"
    with pytest.raises(EckartError, match=message):
        eckart.plan(demo, method="svd", latency="0.9x")


def test_a_damaged_latency_table_is_named(times, demo, cache):
    times(1.0)
    eckart.plan(demo, method="svd", latency="0.9x")
    next(cache.glob("latency-*.json")).write_text("{}")
    with pytest.raises(EckartError, match=r"latency-\w+\.json is damaged .*; delete it and run again"):
        eckart.plan(demo, method="svd", latency="0.9x")


def test_a_real_latency_budget(tmp_path, cache):
    """Layers wide enough for factors to be faster than a dense weight."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "wide")
    outcome = eckart.compress(tmp_path / "wide", tmp_path / "out", method="svd", latency="0.8x")
    assert outcome.plan.spent.after <= 0.8 * outcome.plan.spent.before
    assert any(layer.structure == "lowrank" for layer in outcome.plan.layers)
    held = [json.loads(path.read_text())["seconds"] for path in cache.glob("latency-*.json")]
    assert len(held) == 7  # three shapes of layers, each with and without factors, and the head
    assert all(0 < seconds < 0.1 for table in held for seconds in table.values())
