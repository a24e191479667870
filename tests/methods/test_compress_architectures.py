"""Every kind of transformer: what was measured during the run is what the reloaded folder gives."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch.nn import functional as F

import eckart
from eckart.hosts import EmbeddingHost, Host, TiedHead
from eckart.methods.compress.job import Request, open_job
from eckart.progress import silent
from eckart.stats import sentence_embedding

# GPT-NeoX is saved under older names than it is held under.
pytestmark = pytest.mark.filterwarnings("ignore:.*names its tensors differently")
SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
WORDS = SMALL | {"vocab_size": 200, "intermediate_size": 96, "max_position_embeddings": 64}

MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=False)),
    "llama-bfloat16": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)).bfloat16(),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**SMALL, intermediate_size=96, max_position_embeddings=128)
    ),
    "gpt-j": lambda: hf.GPTJForCausalLM(  # its head has a bias of its own, tied or not
        hf.GPTJConfig(
            vocab_size=512, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=128, tie_word_embeddings=True
        )
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, pad_token_id=0)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**WORDS)),
    "bert-mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**WORDS)),
}
FUSED = {"gpt2": "c_attn", "gpt-neox": "query_key_value", "phi3": "qkv_proj"}
ARGUMENTS = {"samples": 24, "length": 48, "keep": 0.75}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, demo) -> dict[str, Path]:
    """Random models of every kind, with a tokenizer."""
    parent = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        torch.manual_seed(1)
        model = make()
        for parameter in model.parameters():  # biases and norms as in a trained model
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(parent / name)
        if name.startswith("bert"):
            vocabulary = parent / "vocab.txt"
            vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *lexicon(195)]))
            hf.BertTokenizerFast(str(vocabulary)).save_pretrained(parent / name)
        else:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(demo / file, parent / name)
    return {name: parent / name for name in MODELS}


def lexicon(count: int) -> list[str]:
    return ["abcdefghijklmnopqrst"[i // 20] + "abcdefghijklmnopqrst"[i % 20] for i in range(count)]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    """Lines of unequal length made of the encoders' words."""
    path, words = tmp_path_factory.mktemp("text") / "lines.txt", lexicon(195)
    lines = [" ".join(words[(i * j) % 195] for j in range(1, 4 + i % 7)) for i in range(1, 200)]
    path.write_text("\n".join(lines))
    return path


def load(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    return getattr(hf, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def measured_again(before: Path, after: Path, batches, name: str) -> float:
    """What `Measured.after` says, from two whole models."""
    dense, small, total, count = load(before), load(after), 0.0, 0
    for ids in batches:
        a, b = dense(ids), small(ids)
        if name == "loss":
            total += float(F.cross_entropy(b.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
        elif name == "divergence":
            p, q = a.logits.log_softmax(-1), b.logits.log_softmax(-1)
            total, count = total + float((p.exp() * (p - q)).sum()), count + ids.numel()
        else:
            moved = (sentence_embedding(a) - sentence_embedding(b)).square().sum(-1)
            total, count = total + float(moved.sum()), count + ids.shape[0]
    return total / count


@pytest.mark.parametrize("method", ["svd-llm", "eckart", "modegpt"])
@pytest.mark.parametrize("name", list(MODELS))
def test_what_was_measured_is_what_is_loaded(name, method, folders, sentences, text, tmp_path):
    calibration = sentences if name.startswith("bert") else text
    outcome = eckart.compress(folders[name], tmp_path / "out", method=method, calibration=calibration, **ARGUMENTS)
    assert 0.74 <= outcome.plan.kept <= 0.75
    request = Request(folders[name], method, 0.75, calibration, ARGUMENTS["samples"], ARGUMENTS["length"], 0, {})
    batches = open_job(request, silent).samples.held_out
    expected = {"bert": "distance", "bert-mlm": "divergence"}.get(name, "loss")
    assert outcome.measured.name == expected
    again = measured_again(folders[name], tmp_path / "out", batches, expected)
    assert again == pytest.approx(outcome.measured.after, abs=1e-4, rel=1e-3)
    model = load(tmp_path / "out")
    assert sum(isinstance(m, Host) for m in model.modules()) >= 4
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() for t in held.values() if t.is_floating_point()) == outcome.plan.parameters_after
    assert sum(t.nbytes for t in held.values()) == outcome.plan.bytes_after
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    assert {t.dtype for n, t in held.items() if t.is_floating_point() and t.numel()} == {dtype}


@pytest.mark.parametrize("name", list(FUSED))
def test_fused_projections_are_compressed_as_one(name, folders, text, tmp_path):
    outcome = eckart.compress(folders[name], tmp_path / "out", method="svd-llm", calibration=text, **ARGUMENTS)
    fused = [layer for layer in outcome.plan.layers if layer.name.endswith(FUSED[name])]
    assert len(fused) == 2
    assert all(layer.shape[0] > layer.shape[1] for layer in fused)  # (out, in), however it is stored
    assert all(layer.structure == "lowrank" for layer in fused)


def test_an_untied_head_is_compressed_as_well(folders, text, tmp_path):
    arguments = ARGUMENTS | {"keep": 0.4}
    outcome = eckart.compress(folders["llama"], tmp_path / "out", method="eckart", calibration=text, **arguments)
    kinds = {layer.kind: layer for layer in outcome.plan.layers}
    assert kinds["head"].structure != "dense"
    assert kinds["embedding"].structure != "dense"
    model = load(tmp_path / "out")
    assert isinstance(model.lm_head, Host)
    assert isinstance(model.model.embed_tokens, EmbeddingHost)
    request = Request(folders["llama"], "eckart", 0.4, text, ARGUMENTS["samples"], ARGUMENTS["length"], 0, {})
    batches = open_job(request, silent).samples.held_out
    again = measured_again(folders["llama"], tmp_path / "out", batches, "loss")
    assert again == pytest.approx(outcome.measured.after, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt-j", "bert-mlm"])
def test_a_tied_head_follows_its_embedding(name, folders, sentences, text, tmp_path):
    calibration = sentences if name == "bert-mlm" else text
    arguments = ARGUMENTS | {"keep": 0.4, "calibration": calibration}
    outcome = eckart.compress(folders[name], tmp_path / "out", method="eckart", **arguments)
    model = load(tmp_path / "out")
    assert isinstance(model.get_output_embeddings(), TiedHead)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    request = Request(folders[name], "eckart", 0.4, calibration, ARGUMENTS["samples"], ARGUMENTS["length"], 0, {})
    batches = open_job(request, silent).samples.held_out
    again = measured_again(folders[name], tmp_path / "out", batches, outcome.measured.name)
    assert again == pytest.approx(outcome.measured.after, abs=1e-4)


@pytest.mark.parametrize("settings", [{"bias": True}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fitted_bias_is_added_where_there_was_none_and_where_there_was(name, settings, folders, text, tmp_path):
    arguments = ARGUMENTS | {"calibration": text, "settings": settings}
    outcome = eckart.compress(folders[name], tmp_path / "out", method="eckart", **arguments)
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    assert all(entry["bias"] for entry in entries.values() if entry["kind"] == "linear")
    assert 0.74 <= outcome.plan.kept <= 0.75
    request = Request(folders[name], "eckart", 0.75, text, ARGUMENTS["samples"], ARGUMENTS["length"], 0, settings)
    again = measured_again(
        folders[name], tmp_path / "out", open_job(request, silent).samples.held_out, outcome.measured.name
    )
    assert again == pytest.approx(outcome.measured.after, abs=1e-4)
