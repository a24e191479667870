"""Removing whole blocks: chosen as by really removing them, a plain smaller model, nothing fused at first."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import eckart
from eckart.errors import EckartError
from eckart.methods.compress.blocks import Stack, block_influences, macro_influences
from eckart.methods.compress.fusing import group_around
from eckart.methods.compress.job import Request, open_job
from eckart.methods.compress.updates import BiasGraft, Graft, LowRankUpdate, changed, fold
from eckart.progress import silent
from eckart.stats import enter

IDS = torch.arange(1, 41).view(2, 20)
QUICK = {"samples": 4, "length": 48}
SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, attention_bias=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=512, n_embd=32, n_layer=4, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=128)
    ),
    # every second block sees eight tokens only, which no list in config.json says
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**LLAMA, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES | {"vocab_size": 200}, intermediate_size=48)),
}
# Where the blocks are, and what the last one's output goes into.
BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
    "gemma2": "model.layers",
    "bert": "encoder.layer",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*names its tensors differently")


def words() -> list[str]:
    return ["abcdefghijklmnopqrst"[i // 20] + "abcdefghijklmnopqrst"[i % 20] for i in range(195)]


def saved(model, folder: Path, demo: Path) -> Path:
    """A model with norms and biases as in a trained one, blocks of unlike strength, and a tokenizer."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        block = [int(part) for part in name.split(".") if part.isdigit()]
        parameter.data += (0.02 + 0.03 * (block[0] * 2 % 5 if block else 1)) * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if isinstance(model, hf.BertModel):
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words()]))
        hf.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / file, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, demo) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {name: saved(make(), parent / name, demo) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory, text) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(" ".join(words()[(i * j) % 195] for j in range(1, 14)) for i in range(1, 60)))
    return {name: path if name == "bert" else text for name in MODELS}


def load(folder: Path, removed=(), at: str = ""):
    """The whole model, some of its blocks really taken out."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(hf, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32).eval()
    if removed:
        blocks = model.get_submodule(at)
        model.set_submodule(at, nn.ModuleList(block for i, block in enumerate(blocks) if i not in removed))
    return model


@torch.no_grad()
def answer(model) -> torch.Tensor:
    return model(IDS, use_cache=False)[0]


@torch.no_grad()
def last_states(model, at: str, batches) -> torch.Tensor:
    """What the last block gives for every token."""
    seen = []
    last = model.get_submodule(at)[-1]
    last.register_forward_hook(lambda m, args, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
    for ids in batches:
        model(ids, use_cache=False)
    return torch.cat([states.flatten(0, -2) for states in seen]).double()


def removed_of(outcome) -> list[int]:
    gone = {row.name for row in outcome.plan.layers if row.structure == "removed"}
    return sorted({int(next(part for part in name.split(".") if part.isdigit())) for name in gone})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_macro_influence_is_what_removing_each_block_does(name, folders, texts):
    job = open_job(Request(folders[name], "fusegpt", 0.9, texts[name], 6, 40, 0, {}), silent)
    stack = Stack(job, [0, 2, 3])
    stack.hold()
    found = macro_influences(stack, enter(job.runner, job.calibration))
    at = BLOCKS[name]
    whole = last_states(load(folders[name], [1], at), at, job.calibration)
    for index in (0, 2, 3):
        without = last_states(load(folders[name], [1, index], at), at, job.calibration)
        assert found[index] == pytest.approx(1 - float(F.cosine_similarity(whole, without, dim=-1).mean()), abs=1e-5)
    assert len({round(value, 4) for value in found.values()}) == 3


def test_block_influence_is_how_far_a_block_turns_its_input(demo, text):
    job = open_job(Request(demo, "shortgpt", 0.9, text, 4, 48, 0, {}), silent)
    found = block_influences(Stack(job, list(range(5))), enter(job.runner, job.calibration), silent)
    states = []
    model = hf.AutoModelForCausalLM.from_pretrained(demo).eval()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, args, out: states.append((args[0], out)))
    with torch.no_grad():
        for ids in job.calibration:
            model(ids, use_cache=False)
    for index in range(5):
        cosines = torch.cat([F.cosine_similarity(x, y, dim=-1).flatten() for x, y in states[index::5]])
        assert found[index] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)


@pytest.mark.parametrize("method", ["shortgpt", "fusegpt"])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_folder_is_the_model_without_those_blocks(name, method, folders, texts, tmp_path):
    settings = {"epochs": 0} if method == "fusegpt" else {}
    arguments = QUICK | {"method": method, "calibration": texts[name], "settings": settings, "keep": 0.7}
    outcome = eckart.compress(folders[name], tmp_path / "out", **arguments)
    removed = removed_of(outcome)
    assert 1 <= len(removed) <= 3
    expected = answer(load(folders[name], removed, BLOCKS[name]))
    torch.testing.assert_close(answer(load(tmp_path / "out")), expected, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_layer" if name == "gpt2" else "num_hidden_layers"] == 4 - len(removed)
    if name == "gemma2":
        whole = load(folders[name]).config.layer_types
        assert len(set(whole)) == 2
        assert config["layer_types"] == [kind for i, kind in enumerate(whole) if i not in removed]
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() for t in held.values()) == outcome.plan.parameters_after
    one = sum(row.dense_numbers for row in outcome.plan.layers if f".{removed[0]}." in row.name)
    total = outcome.plan.parameters_before
    assert outcome.plan.parameters_after <= 0.7 * total < outcome.plan.parameters_after + one  # no block too many


PLAIN = """
import sys
sys.modules["eckart"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
torch.save(model(torch.arange(1, 41).view(2, 20)).logits, sys.argv[2])
"""


def test_plain_transformers_loads_what_was_fused(demo, text, tmp_path):
    arguments = QUICK | {"method": "fusegpt", "calibration": text, "settings": {"epochs": 2}}
    outcome = eckart.compress(demo, tmp_path / "out", bytes="0.75MB", **arguments)
    assert outcome.plan.bytes_after <= 750_000
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "out", tmp_path / "logits.pt"],
        check=False,
        timeout=120,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert run.returncode == 0
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), answer(load(tmp_path / "out")))


def test_fusion_begins_with_nothing_and_folds_to_the_formula():
    torch.manual_seed(0)
    layer, removed = nn.Linear(12, 7).requires_grad_(False), nn.Linear(12, 7).requires_grad_(False)
    x, before = torch.randn(5, 12), layer.weight.clone()
    expected = layer(x)
    graft = Graft(layer.weight, removed.weight, 4, torch.Generator().manual_seed(0))
    changed(layer, "weight", graft)
    changed(layer, "bias", BiasGraft(removed.bias))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    for parameter in graft.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    update = graft.up @ graft.down + (graft.coefficients_up @ graft.coefficients_down) * removed.weight
    fold([layer])
    assert type(layer) is nn.Linear
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    torch.testing.assert_close(layer.weight, before + update)
    assert not layer.weight.requires_grad


def test_an_update_is_never_of_higher_rank_than_its_matrix():
    update = LowRankUpdate(torch.randn(3, 20), 8, 2.0, torch.Generator().manual_seed(0))
    assert (update.up.shape, update.down.shape) == ((3, 3), (3, 20))


@pytest.mark.parametrize(
    ("removed", "group"),
    [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (5, [2, 3, 5, 6]), (6, [3, 5, 6, 7]), (9, [6, 7, 8, 9])],
)
def test_a_group_lies_around_the_removed_block(removed, group):
    assert group_around([0, 1, 2, 3, 5, 6, 7, 8, 9], removed, 4) == group
    assert group_around([3, 8], 8, 4) == [3, 8]


def test_fusion_recovers_what_plain_removal_loses(demo, text, tmp_path):
    arguments = {"method": "fusegpt", "calibration": text, "samples": 24, "length": 64, "keep": 0.85}
    loss = {}
    for epochs in (0, 80):
        settings = {"epochs": epochs, "rate": 3e-3}
        outcome = eckart.compress(demo, tmp_path / str(epochs), settings=settings, **arguments)
        loss[epochs] = outcome.measured.after
    assert outcome.measured.before < loss[80] < loss[0] - 0.1


def test_what_cannot_lose_blocks_is_refused_and_nothing_is_written(demo, text, tmp_path):
    arguments = QUICK | {"calibration": text, "keep": 0.7}

    def refused(folder: Path, message: str, **changes) -> None:
        with pytest.raises(EckartError, match=message):
            eckart.compress(folder, tmp_path / "out", **arguments | {"method": "shortgpt"} | changes)

    refused(demo, r"keep 0.1 of 260,032.* cannot be met even with one of 5 blocks; ask for more", keep=0.1)
    refused(demo, "flops of shortgpt cannot be told beforehand", keep=None, flops="0.7x")
    refused(demo, "shortgpt needs a calibration text", calibration=None)
    refused(demo, "removing blocks changes the whole model at once", settings={"heal": 1})
    refused(demo, "group must be at least 2, got 1", method="fusegpt", settings={"group": 1})
    scaled = hf.GPT2Config(vocab_size=512, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    scaled.scale_attn_by_inverse_layer_idx = True
    gpt2 = saved(hf.GPT2LMHeadModel(scaled), tmp_path / "gpt2", demo)
    refused(gpt2, "what a block of GPT2LMHeadModel is depends on how many come before it")
    mixed = hf.Qwen3MoeConfig(**LLAMA, head_dim=8, num_experts=2, moe_intermediate_size=48, mlp_only_layers=[2])
    mixed = saved(hf.Qwen3MoeForCausalLM(mixed), tmp_path / "moe", demo)
    refused(mixed, "differ in their layers, so one cannot be fused into another; use shortgpt", method="fusegpt")
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2", "moe"}


def test_a_run_that_diverges_keeps_its_state(demo, text, tmp_path):
    arguments = QUICK | {"method": "fusegpt", "calibration": text, "keep": 0.85}
    with pytest.raises(EckartError, match=r"the fuse run diverged at step .* use a smaller learning rate"):
        eckart.compress(demo, tmp_path / "out", settings={"rate": 1e4, "epochs": 20}, **arguments)
    (left,) = tmp_path.iterdir()
    assert (left / "fuse-000.safetensors").is_file()
