"""Folders of codes load through plain transformers, are saved again bit for bit, and become dense; what keep means."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eckart
from eckart.errors import EckartError
from eckart.files.inspect import densify, show

IDS = torch.arange(1, 49).view(2, 24)
# Dense codes; factors, one of them looked up; pivots, likewise; a table per row.
FOLDERS = {
    "dense": ("rtn", None, {"bits": 3, "embeddings": True}),
    "factors": ("svd", 0.8, {"bits": 4, "embeddings": True}),
    "pivoted": ("svd", 0.8, {"bits": 8, "embeddings": True, "storage": "pivoted"}),
    "tables": ("rtn", None, {"levels": "learned", "symmetric": True, "clip": True}),
}


@pytest.fixture(scope="module")
def folders(demo, tmp_path_factory):
    parent = tmp_path_factory.mktemp("quantized")
    return {
        name: eckart.compress(demo, parent / name, method=method, keep=keep, settings=settings).out
        for name, (method, keep, settings) in FOLDERS.items()
    }


@torch.no_grad()
def logits(folder, **arguments) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()(IDS).logits


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_again_every_tensor_is_the_same(name, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (folders[name], tmp_path / "again"))
    assert first.keys() == second.keys()
    assert [key for key in first if first[key].dtype != second[key].dtype or not first[key].equal(second[key])] == []
    assert torch.uint8 in {t.dtype for t in first.values()}
    assert torch.equal(logits(folders[name]), logits(tmp_path / "again"))


@pytest.mark.parametrize("name", FOLDERS)
def test_made_dense_the_model_is_the_same(name, folders, tmp_path):
    densify(folders[name], tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(folders[name]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_other_dtypes_leave_the_codes_alone(name, folders):
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16)
    codes = {key: t for key, t in model.state_dict().items() if key.endswith("codes")}
    held = load_file(folders[name] / "model.safetensors")
    assert codes
    assert all(t.equal(held[key]) for key, t in codes.items())
    found, exact = model.eval()(IDS).logits, logits(folders[name])
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


def test_show_counts_codes_as_parameters(folders, demo):
    contents, dense = show(folders["dense"]), show(demo)
    assert contents.parameters == contents.dense_parameters == dense.parameters
    held = load_file(folders["dense"] / "model.safetensors")
    assert contents.nbytes == sum(t.nbytes for t in held.values())
    assert 8 * contents.nbytes / contents.parameters < 6  # 3 bits, and two numbers of 32 bits for 64 weights or more
    assert {layer.structure for layer in contents.layers} == {"quantized"}
    assert 0.79 < show(folders["pivoted"]).kept <= 0.8


def test_codes_generate(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["pivoted"])
    made = model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        expected = model(made[:, :-1]).logits[:, 3:].argmax(-1)
    assert torch.equal(made[:, 4:], expected)


def test_keep_is_one_for_quantizers_and_said_so(demo):
    assert eckart.plan(demo, method="rtn").keep == 1.0
    assert eckart.plan(demo, method="svd").keep == 0.6
    with pytest.raises(EckartError, match=r"rtn stores all parameters .* so keep must be 1, got 0\.6; .* bits=4"):
        eckart.plan(demo, method="rtn", keep=0.6)


def test_a_plan_knows_what_codes_cost_and_spoil(demo, text):
    arguments = {"method": "svd-llm", "keep": 0.8, "calibration": text, "samples": 4, "length": 48}
    losses = [eckart.plan(demo, **arguments, settings={"bits": bits}).loss for bits in (0, 8, 4, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[1] < losses[2] < losses[3]


def test_gptq_beats_rounding_and_needs_no_more_bytes(demo, text, tmp_path):
    arguments = {"calibration": text, "samples": 16, "length": 64}
    found = {}
    for method in ("rtn", "gptq"):
        outcome = eckart.compress(demo, tmp_path / method, method=method, settings={"bits": 3}, **arguments)
        found[method] = outcome.measured.after - outcome.measured.before, outcome.plan.bytes_after
    assert found["gptq"][0] < 0.8 * found["rtn"][0]
    assert found["gptq"][1] == found["rtn"][1]
