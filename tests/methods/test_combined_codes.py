"""Codes of narrower layers, of fewer blocks, of elastic folders and of shared factors are what was planned."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eckart
from eckart.errors import EckartError
from eckart.files.elastic import read_order
from eckart.files.inspect import densify, show

IDS = torch.arange(1, 49).view(2, 24)
RUN = {"samples": 8, "length": 64, "cache": False}
# Method, settings beside bits, and what the layers are called.
COMBINED = {
    "units": ("modegpt", {}, {"neurons int8", "heads int8"}),
    "units beside low rank": ("modegpt", {"heads": False}, {"neurons int8", "lowrank int8"}),
    "coordinates": ("slicegpt", {"untie": True, "embeddings": True}, {"sliced int8", "sliced"}),
    "blocks": ("shortgpt", {}, {"int8", "dense", "removed"}),
    "fused blocks": ("fusegpt", {"epochs": 1}, {"int8", "dense", "removed"}),
    "basis": ("basis-sharing", {}, {"shared lowrank int8", "lowrank int8"}),
    "clusters": ("concatenated-svd", {"threshold": 1.2}, {"shared lowrank int8", "lowrank int8"}),
    "dictionary": ("cospadi", {"group": 2, "iterations": 1}, {"shared dictionary int8", "dictionary int8"}),
}
ELASTIC = {"method": "eckart", "keep": 0.9, "elastic": True, "least": 0.7}


def run(model, out, text, name, bits, **more):
    method, settings, _ = COMBINED[name]
    # an embedding is only taken in as codes
    kept = {k: v for k, v in settings.items() if bits or k != "embeddings"}
    arguments = {"keep": 0.75, **RUN, **more}
    return eckart.compress(model, out, method=method, calibration=text, settings=kept | {"bits": bits}, **arguments)


@torch.no_grad()
def logits(folder, **options) -> torch.Tensor:
    return eckart.load(folder, **options).eval()(IDS).logits


@pytest.fixture(scope="module")
def folders(demo, text, tmp_path_factory):
    """Every combination with 8 bits, checked by the guarantee, beside the run without codes."""
    parent = tmp_path_factory.mktemp("combined")
    return {
        name: (run(demo, parent / name, text, name, 8), run(demo, parent / f"{name} plain", text, name, 0, check=False))
        for name in COMBINED
    }


@pytest.mark.parametrize("name", COMBINED)
def test_codes_are_what_the_plan_said_and_lose_hardly_anything(name, folders, demo, text):
    coded, plain = folders[name]
    held = load_file(coded.out / "model.safetensors")
    stored = sum(t.nbytes for t in held.values())
    method, settings, structures = COMBINED[name]
    arguments = {"method": method, "keep": 0.75, "calibration": text, **RUN}
    planned = eckart.plan(demo, settings=settings | {"bits": 8}, **arguments)
    assert planned.bytes_after == coded.plan.bytes_after == coded.checked.nbytes == show(coded.out).nbytes == stored
    assert planned.parameters_after == coded.plan.parameters_after == plain.plan.parameters_after
    assert {row.structure for row in coded.plan.layers} == {row.structure for row in planned.layers} == structures
    assert torch.uint8 in {t.dtype for t in held.values()}
    assert stored < 0.5 * plain.plan.bytes_after
    assert coded.measured.before == plain.measured.before
    assert coded.measured.after < 1.01 * plain.measured.after


@pytest.mark.parametrize("name", COMBINED)
def test_folders_are_saved_again_and_made_dense(name, folders, tmp_path):
    out = folders[name][0].out
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)
    densify(out, tmp_path / "dense")
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(out), atol=1e-4, rtol=1e-4)
    half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()(IDS).logits
    assert (half.float() - logits(out)).norm() < 0.05 * logits(out).norm()


@pytest.mark.parametrize("name", ["units", "coordinates", "basis"])
def test_fewer_bits_lose_more_and_budgets_over_bytes_are_kept(name, folders, demo, text, tmp_path):
    coded, plain = folders[name]
    four = run(demo, tmp_path / "4", text, name, 4, check=False)
    assert four.plan.bytes_after < coded.plan.bytes_after
    assert coded.measured.after - 0.01 < four.measured.after < 1.25 * plain.measured.after
    limit = four.plan.bytes_after + 20_000
    within = run(demo, tmp_path / "bytes", text, name, 4, keep=None, bytes=limit)
    assert four.plan.bytes_after <= within.plan.bytes_after <= limit


def test_all_units_that_stay_are_codes_of_their_own_layers(demo, text, tmp_path):
    """At keep 1 nothing becomes narrower, and every layer is rounded like a dense one."""
    whole = run(demo, tmp_path / "out", text, "units", 4, keep=1.0)
    assert {row.structure for row in whole.plan.layers} == {"int4"}
    assert whole.measured.after < 1.1 * whole.measured.before


def test_units_among_other_structures_become_codes(demo, text, tmp_path):
    settings = {"neurons": "always", "iterations": 1, "bits": 8}
    arguments = {"method": "eckart-mixed", "keep": 0.2, "calibration": text, **RUN, "settings": settings}
    made = eckart.compress(demo, tmp_path / "out", **arguments)
    assert "neurons int8" in {row.structure for row in made.plan.layers}
    planned = eckart.plan(demo, **arguments)
    assert planned.bytes_after == made.plan.bytes_after == show(made.out).nbytes


def test_a_shared_factor_is_stored_once(folders):
    config = json.loads((folders["basis"][0].out / "config.json").read_text())["quantization_config"]["layers"]
    held = load_file(folders["basis"][0].out / "model.safetensors")
    taken = {name: entry["shared"] for name, entry in config.items() if "shared" in entry}
    assert taken
    for name, owners in taken.items():
        assert owners.keys() == {"1.codes", "1.scale", "1.zero"}
        assert not any(f"{name}.{key}" in held for key in owners)
    model = eckart.load(folders["basis"][0].out)
    name, owners = next(iter(taken.items()))
    assert model.get_buffer(f"{name}.1.codes") is model.get_buffer(f"{owners['1.codes']}.1.codes")
    assert model.get_parameter(f"{name}.1.scale") is model.get_parameter(f"{owners['1.scale']}.1.scale")


@pytest.fixture(scope="module", params=[8, 4])
def elastic(request, demo, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("elastic") / "out"
    settings = {"bits": request.param, "storage": "lowrank", "embeddings": request.param == 4}
    return eckart.compress(demo, out, calibration=text, settings=settings, **ELASTIC, **RUN)


def test_a_cut_is_the_same_however_it_is_reached_and_decodes_nothing(elastic, tmp_path):
    held = {key: t for path in (elastic.out / "elastic").iterdir() for key, t in load_file(path).items()}
    for keep in (0.7, 0.78, 0.9):
        cut = eckart.slice_folder(elastic.out, tmp_path / str(keep), keep=keep)
        assert torch.equal(logits(cut), logits(elastic.out, keep=keep))
        made, found = show(cut).made_by, load_file(cut / "model.safetensors")
        assert made["bytes_after"] == show(cut).nbytes == sum(t.nbytes for t in found.values())
        assert keep - 0.01 <= show(cut).kept <= keep
        for key, codes in found.items():
            layer, _, last = key.rpartition(".0.")
            if last == "codes" and not layer.endswith("embed_tokens"):
                assert codes.equal(held[f"{layer}.up.codes"][: len(codes)])
    assert torch.equal(logits(elastic.out), logits(elastic.out, keep=0.9))


def test_elastic_codes_are_planned_and_stay_near_those_without(elastic, demo, text, tmp_path):
    bits = read_order(elastic.out).codes.bits
    settings = {"storage": "lowrank", "embeddings": bits == 4}
    planned = eckart.plan(demo, calibration=text, settings=settings | {"bits": bits}, **ELASTIC, **RUN)
    assert planned.bytes_after == elastic.plan.bytes_after == show(elastic.out).nbytes == elastic.checked.nbytes
    held = [each for path in (elastic.out / "elastic").iterdir() for each in load_file(path).items()]
    assert planned.components == sum(t.nbytes for key, t in held if key not in ("steps", "losses"))
    for size in planned.sizes[::4]:
        cut = eckart.slice_folder(elastic.out, tmp_path / str(size.keep), keep=size.keep)
        assert show(cut).nbytes == size.nbytes
    arguments = ELASTIC | {"check": False}
    plain = eckart.compress(demo, tmp_path / "plain", calibration=text, settings=settings, **arguments, **RUN)
    assert elastic.measured.after < (1.01 if bits == 8 else 1.25) * plain.measured.after
    valid = text.with_name("valid.txt")
    found = [
        eckart.evaluate(eckart.slice_folder(out, tmp_path / name, keep=0.75), text=valid, limit=4000).nats_per_token
        for out, name in ((elastic.out, "a"), (plain.out, "b"))
    ]
    assert found[0] < (1.01 if bits == 8 else 1.25) * found[1]


def test_a_damaged_component_is_named(elastic, tmp_path):
    part = next(path for path in (elastic.out / "elastic").iterdir() if path.name.startswith("block"))
    before = part.read_bytes()
    part.write_bytes(before[: len(before) // 2])
    try:
        with pytest.raises(EckartError, match=r"missing, damaged or incomplete .*copy the folder again"):
            eckart.slice_folder(elastic.out, tmp_path / "cut", keep=0.75)
    finally:
        part.write_bytes(before)


def test_codes_of_pivots_cannot_be_cut(demo, text, tmp_path):
    with pytest.raises(EckartError, match="codes of pivoted maps are those of one rank and cannot be cut; give stor"):
        eckart.compress(demo, tmp_path / "out", calibration=text, settings={"bits": 4}, **ELASTIC, **RUN)
    assert not list(tmp_path.iterdir())
