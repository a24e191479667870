"""Folders of codes load through plain transformers, are saved again bit for bit, and become dense; what keep means."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eckart
from eckart.errors import EckartError
from eckart.files.inspect import densify, show
from eckart.fit.quantize import Coding, quantize
from eckart.methods.compress.rounding import LearnedRounding

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


def test_learned_codes_beat_those_they_start_from_and_are_plain_codes(demo, text, tmp_path):
    arguments = {"method": "lrq", "calibration": text, "samples": 16, "length": 64}
    found = {}
    for epochs in (0, 30):
        outcome = eckart.compress(demo, tmp_path / str(epochs), settings={"bits": 3, "heal": epochs}, **arguments)
        found[epochs] = outcome.measured.after - outcome.measured.before, outcome.plan.bytes_after
    assert found[30][0] < 0.9 * found[0][0]
    assert found[30][1] == found[0][1]
    first, second = (load_file(tmp_path / str(epochs) / "model.safetensors") for epochs in (0, 30))
    assert first.keys() == second.keys()
    norms = [key for key in first if key.endswith("norm.weight")]
    assert norms
    assert all(first[key].equal(second[key]) for key in norms)  # nothing but codes and scales is trained


def test_learned_rounding_starts_at_its_codes_and_has_gradients():
    torch.manual_seed(0)
    weight, x = torch.randn(12, 40), torch.randn(5, 40)
    start = quantize(weight, Coding(3, 16, "nearest"), axis="rows")
    module = LearnedRounding(weight, start, torch.randn(12), 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), start(x) + module.bias, atol=1e-5, rtol=1e-5)
    assert module.result(torch.float32) == start
    module(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in module.named_parameters() if name != "right")  # times L = 0
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    learned = module.result(torch.float32)
    assert not learned.codes.equal(start.codes)
    torch.testing.assert_close(module(x), learned(x) + module.bias, atol=1e-5, rtol=1e-5)


def test_sparse_maps_of_codes_take_what_the_plan_says(demo, text, tmp_path):
    settings = {"bits": 4, "iterations": 2}
    arguments = {"method": "oats", "keep": 0.7, "calibration": text, "samples": 4, "length": 48, "settings": settings}
    outcome = eckart.compress(demo, tmp_path / "out", **arguments)
    held = load_file(tmp_path / "out" / "model.safetensors")
    stored = sum(t.nbytes for t in held.values())
    assert eckart.plan(demo, **arguments).bytes_after == outcome.plan.bytes_after == stored
    assert outcome.plan.kept <= 0.7
    assert any(key.endswith("values.codes") for key in held)
