"""Slicing a whole model: nothing changes without deleting, plain transformers loads the result, others are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import eckart
from eckart.errors import EckartError
from eckart.methods.compress.job import Request, open_job
from eckart.methods.compress.residual_slicing import principal_axes, residual_axis, write_sliced
from eckart.progress import silent

IDS = torch.arange(1, 41).view(2, 20)
QUICK = {"method": "slicegpt", "samples": 4, "length": 48}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def job_of(demo, text, **settings):
    return open_job(Request(demo, "slicegpt", 0.7, text, 4, 48, 0, settings), silent)


def random_llama(folder: Path, demo: Path, **changes) -> Path:
    """A small Llama with norms and biases as in a trained model, and the demonstration model's tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = {"vocab_size": 512, "intermediate_size": 96, "max_position_embeddings": 128, "attention_bias": True}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes | options | changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((demo / file).read_bytes())
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotation_alone_changes_nothing(tied, demo, text, tmp_path):
    """All coordinates in another basis, through the code that writes fewer: the function must be the same."""
    folder = random_llama(tmp_path / "in", demo, tie_word_embeddings=tied)
    job = job_of(folder, text, untie=tied)
    axis = residual_axis(job)
    assert set(axis.blocks["model.layers.1"].writers) == {"self_attn.o_proj", "mlp.down_proj"}
    basis = principal_axes(job, axis, silent)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(64, dtype=torch.float64))
    wider = torch.cat([basis, basis.new_zeros(64, 4)], 1)  # four coordinates of nothing: all is rotated, none deleted
    (tmp_path / "out").mkdir()
    write_sliced(job, axis, wider, tmp_path / "out", silent)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"]) == (68, 16)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=2e-4, rtol=2e-4)


def test_the_axes_are_those_of_the_normalized_stream(demo, text):
    job = job_of(demo, text)
    axis = residual_axis(job)
    basis = principal_axes(job, axis, silent)
    model, seen = hf.AutoModelForCausalLM.from_pretrained(demo).eval(), []
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for ids in job.calibration:
            model(ids)
    z = torch.cat([nn.functional.normalize(x, dim=-1) for x in seen])
    variance = (z @ basis).square().mean(0)
    assert (variance[:-1] >= variance[1:] - 1e-7).all()
    mixed = basis.mT @ (z.mT @ z / z.shape[0]) @ basis
    assert (mixed - variance.diag()).abs().max() < 1e-6


PLAIN = """
import sys
sys.modules["eckart"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
torch.save(model(torch.arange(1, 41).view(2, 20)).logits, sys.argv[2])
"""


@pytest.mark.parametrize("untie", [True, False])
def test_the_folder_is_a_plain_smaller_model(untie, demo, text, tmp_path):
    arguments = QUICK | {"calibration": text, "settings": {"untie": untie}}
    outcome = eckart.compress(demo, tmp_path / "out", keep=0.7, **arguments)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is not untie
    assert config["hidden_size"] % 8 == 0
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = sum(p.numel() for p in model.parameters())
    assert stored == outcome.plan.parameters_after <= 0.7 * outcome.plan.parameters_before
    assert outcome.plan.bytes_after == sum(row.nbytes for row in outcome.plan.layers)
    assert eckart.plan(demo, keep=0.7, **arguments).parameters_after == stored
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "out", tmp_path / "logits.pt"],
        check=False,
        timeout=120,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert run.returncode == 0
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(tmp_path / "out"))
    assert outcome.measured.before < outcome.measured.after < 6.3  # a vocabulary of 512 guesses at 6.24


def test_what_cannot_be_sliced_is_refused_and_nothing_is_written(demo, text, tmp_path):
    arguments = QUICK | {"calibration": text}
    with pytest.raises(EckartError, match=r"cannot be met even with 8 of 64 coordinates"):
        eckart.compress(demo, tmp_path / "out", keep=0.05, **arguments)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    model.save_pretrained(tmp_path / "gpt2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gpt2" / file).write_bytes((demo / file).read_bytes())
    with pytest.raises(EckartError, match="GPT2LMHeadModel cannot be sliced: that needs an RMSNorm"):
        eckart.compress(tmp_path / "gpt2", tmp_path / "out", keep=0.7, **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2"}
