"""LoRA healing: the same tensors in the same folder, a lower loss, nothing changed but the factors."""

import json

import pytest
import torch
from safetensors.torch import load_file

import eckart
from eckart.errors import EckartError
from eckart.methods.compress.lora import sides_of

LORA = {"heal": 2, "heal_kind": "lora", "heal_rate": 2e-3}
ARGUMENTS = {"samples": 64, "length": 48, "keep": 0.7}


def entries(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]


@pytest.mark.parametrize(("storage", "factors"), [("lowrank", ("up", "down")), ("pivoted", ("coefficients", "basis"))])
def test_healing_lowers_the_loss_and_changes_the_factors_alone(storage, factors, demo, text, tmp_path):
    arguments = ARGUMENTS | {"calibration": text, "method": "svd-llm"}
    plain = eckart.compress(demo, tmp_path / "plain", settings={"storage": storage}, **arguments)
    healed = eckart.compress(demo, tmp_path / "healed", settings={"storage": storage, **LORA}, **arguments)
    assert healed.measured.before == pytest.approx(plain.measured.before, abs=1e-6)
    assert healed.measured.after < plain.measured.after - 0.1
    assert healed.plan.layers == plain.plan.layers
    assert healed.plan.bytes_after == plain.plan.bytes_after
    assert entries(healed.out) == entries(plain.out)
    before, after = (load_file(outcome.out / "model.safetensors") for outcome in (plain, healed))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == {name for name in before if name.split(".")[-2] in factors}
    for name in differing:  # by a matrix of the updates' rank
        rank = int(torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-4))
        assert 1 <= rank <= 8, name


def test_the_factor_applied_last_is_trained_first(demo, text, tmp_path):
    arguments = ARGUMENTS | {"calibration": text, "method": "eckart", "settings": {"storage": "pivoted"}}
    outcome = eckart.compress(demo, tmp_path / "out", **arguments)
    model, spec = eckart.load(outcome.out), entries(outcome.out)
    last, first = sides_of(model, tuple(f"model.layers.{i}" for i in range(5)))
    inside = [name for name in spec if name.startswith("model.layers.")]
    assert len(last) == len(first) == len(inside)  # the embedding, compressed as well, is left alone
    for name in inside:
        rows = spec[name]["map"]["axis"] == "rows"
        assert f"{name}.{'coefficients' if rows else 'basis'}" in last
        assert f"{name}.{'basis' if rows else 'coefficients'}" in first


def test_what_layers_share_stays_as_it_was(demo, text, tmp_path):
    arguments = ARGUMENTS | {"calibration": text, "method": "basis-sharing"}
    plain = eckart.compress(demo, tmp_path / "plain", **arguments)
    healed = eckart.compress(demo, tmp_path / "healed", settings=LORA, **arguments)
    assert healed.measured.after < plain.measured.after
    before, after = (load_file(outcome.out / "model.safetensors") for outcome in (plain, healed))
    owners = {f"{o}.{k}" for e in entries(plain.out).values() for k, o in e.get("shared", {}).items()}
    assert owners
    assert all(torch.equal(before[name], after[name]) for name in owners)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_healing_that_diverges_keeps_its_state(demo, text, tmp_path):
    settings = LORA | {"heal_rate": 1e6, "heal": 10}
    with pytest.raises(EckartError, match=r"the lora run diverged at step .* use a smaller learning rate"):
        eckart.compress(demo, tmp_path / "out", method="svd", calibration=text, settings=settings, **ARGUMENTS)
    (left,) = tmp_path.iterdir()
    assert (left / "lora-0.safetensors").is_file()
