"""Fewer hidden units in a whole model: narrow dense layers that load, save, widen again, and are never misread."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import eckart
from eckart.errors import EckartError
from eckart.fit import metric
from eckart.fit.neurons import leverage_scores
from eckart.hosts import map_of
from eckart.methods.compress.job import Request, open_job
from eckart.progress import silent

IDS = torch.arange(1, 41).view(2, 20)


@pytest.fixture
def folder(compressed) -> Path:
    return compressed("modegpt").out


def load(folder: Path) -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_the_narrow_layers_are_those_of_the_formula(folder, demo, text, quick):
    dense, narrow = load(demo), load(folder)
    asked = quick("modegpt")
    request = Request(demo, "modegpt", 0.7, text, asked["samples"], asked["length"], 0, asked["settings"])
    seen: list[torch.Tensor] = []
    before, after = (model.model.layers[2].mlp for model in (dense, narrow))
    before.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for ids in open_job(request, silent).calibration:
            dense(ids)
    h, count = torch.cat(seen), after.down_proj.in_features
    assert 1 < count < before.down_proj.in_features
    assert type(after.down_proj) is nn.Linear
    kept = leverage_scores(metric(h.mT @ h / h.shape[0]).inputs).topk(count).indices.sort().values
    torch.testing.assert_close(after.up_proj.weight, before.up_proj.weight[kept])
    torch.testing.assert_close(after.gate_proj.weight, before.gate_proj.weight[kept])
    best = torch.linalg.lstsq(h[:, kept], h @ before.down_proj.weight.double().mT, driver="gelsd").solution.mT
    fitted, wanted = (h[:, kept] @ w.double().mT for w in (after.down_proj.weight, best))
    assert (fitted - wanted).norm() < 1e-3 * wanted.norm()


def test_heads_are_those_of_the_formula(folder, demo, text, quick):
    """Queries and keys keep channels in pairs of halves, by scores; values and output are the best of their rank."""
    dense, narrow = load(demo), load(folder)
    asked = quick("modegpt")
    request = Request(demo, "modegpt", 0.7, text, asked["samples"], asked["length"], 0, asked["settings"])
    seen: list[torch.Tensor] = []
    before, after = (model.model.layers[2].self_attn for model in (dense, narrow))
    before.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for ids in open_job(request, silent).calibration:
            dense(ids)
    x, size = torch.cat(seen), before.head_dim
    old = {name: getattr(before, f"{name}_proj").weight.detach().double() for name in "qkvo"}
    new = {name: map_of(getattr(after, f"{name}_proj")).dense().detach().double() for name in "qkvo"}
    q, k = ((x @ old[name].mT).view(len(x), -1, 2, size // 2) for name in "qk")
    keys, shared = k.shape[1], q.shape[1] // k.shape[1]
    power_q, power_k = (part.square().mean(0).sum(1) for part in (q, k))  # (heads, pairs)
    scores = (power_q.view(keys, shared, -1) * power_k[:, None]).sqrt().sum(1)
    count = map_of(after.v_proj).maps[1].shape[0] // keys
    assert 1 < count < size
    for head in range(keys):
        pairs = scores[head].topk(count // 2).indices
        kept = torch.cat((pairs, pairs + size // 2))
        rows = [size * head + kept] + [size * (head * shared + j) + kept for j in range(shared)]
        for name, places in (("k", rows[0]), *(("q", at) for at in rows[1:])):
            wanted, start = torch.zeros(size, x.shape[1], dtype=torch.float64), int(places[0]) // size * size
            wanted[places - start] = old[name][places]
            torch.testing.assert_close(new[name][start : start + size], wanted)
        columns = slice(head * shared * size, (head + 1) * shared * size)
        was, now = (
            torch.cat([o @ w["v"][head * size : (head + 1) * size] for o in w["o"][:, columns].split(size, 1)])
            for w in (old, new)
        )
        best = torch.linalg.svdvals(x @ was.mT)[count:].square().sum()
        assert float((x @ (was - now).mT).square().sum()) == pytest.approx(float(best), rel=1e-3)


def test_plan_and_folder_agree_on_every_layer(folder, compressed):
    rows = {row.name: row for row in compressed("modegpt").plan.layers}
    contents = {layer.name: layer for layer in eckart.show(folder).layers}
    units = [row for row in rows.values() if row.structure == "neurons"]
    assert {row.name.rpartition(".")[2] for row in units} == {"gate_proj", "up_proj", "down_proj"}
    for row in units:
        assert (contents[row.name].structure, contents[row.name].numbers) == ("neurons", row.numbers)
        assert contents[row.name].dense_numbers == row.dense_numbers
        narrow = (row.shape[0], row.rank) if row.name.endswith("down_proj") else (row.rank, row.shape[1])
        assert contents[row.name].shape == narrow
    heads = [row for row in rows.values() if row.structure == "heads"]
    assert {row.name.rpartition(".")[2] for row in heads} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for row in heads:
        assert contents[row.name].numbers == row.numbers == row.dense_numbers * row.rank // 8
        assert contents[row.name].nbytes == row.nbytes
    assert sum(row.numbers for row in rows.values()) < sum(row.dense_numbers for row in rows.values())


def test_saving_densifying_and_dequantizing_give_the_same_logits(folder, tmp_path):
    model = load(folder)
    expected = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    eckart.densify(folder, tmp_path / "dense")
    dense = load(tmp_path / "dense")
    assert type(dense.model.layers[0].mlp.down_proj) is nn.Linear
    assert dense.model.layers[0].mlp.down_proj.in_features == dense.config.intermediate_size
    torch.testing.assert_close(logits(dense), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model.dequantize()), expected, atol=1e-4, rtol=1e-4)
    assert model.model.layers[0].mlp.up_proj.weight.shape == dense.model.layers[0].mlp.up_proj.weight.shape


def test_gpt2_gets_its_own_transposed_layers_again(demo, text, tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    model = hf.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "gpt2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, tmp_path / "gpt2")
    arguments = {"method": "modegpt", "keep": 0.7, "samples": 8, "length": 48, "calibration": text}
    eckart.compress(tmp_path / "gpt2", tmp_path / "out", **arguments)
    model = load(tmp_path / "out")
    narrow, expected = model.transformer.h[0].mlp.c_fc, logits(model)
    assert narrow.out_features < 256
    assert narrow.bias.shape == (narrow.out_features,)
    attention = model.transformer.h[0].attn
    assert map_of(attention.c_attn).maps[1].shape[0] == 3 * map_of(attention.c_proj).maps[0].shape[1] < 3 * 64
    eckart.densify(tmp_path / "out", tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense")), expected, atol=1e-4, rtol=1e-4)
    dense = model.dequantize()
    assert type(dense.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    torch.testing.assert_close(logits(dense), expected, atol=1e-4, rtol=1e-4)


def entries(config: dict) -> dict:
    return config["quantization_config"]["layers"]


DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
DAMAGES = {
    "one narrower than the others": (
        lambda c: entries(c)[UP]["map"].update(weight=[3, 64]),
        f"the layers around the hidden units of '{DOWN}' do not have the same number of them",
    ),
    "no reader": (lambda c: entries(c).pop(DOWN), f"hidden units of '{DOWN}' do not have the same number"),
    "not said": (
        lambda c: entries(c)[UP].update(neurons={"group": DOWN}),
        f"spec of layer '{UP}' is invalid: it does not say which hidden units it has",
    ),
    "not a dense map": (
        lambda c: entries(c)[UP].update(map={"op": "Diagonal", "scale": [64]}),
        f"spec of layer '{UP}' is invalid: it does not say which hidden units it has",
    ),
    "of another model": (
        lambda c: [e["neurons"].update(of=99) for e in entries(c).values() if "neurons" in e],
        "is 172 x 64 in this model, but its spec is 99 x 64",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_configs_are_refused(damage, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    change, message = DAMAGES[damage]
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(EckartError, match=message):
        load(copy)
    with pytest.raises(EckartError):
        eckart.show(copy)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(7)
"""


def test_without_eckart_narrow_layers_alone_stop_loading(folder, tmp_path):
    """There is no sentinel where every compressed layer holds a weight; its shape must be enough."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config.pop("quantization_config")  # as if it were ignored
    (copy / "config.json").write_text(json.dumps(config))
    run = subprocess.run([sys.executable, "-c", PLAIN, copy], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 7, run.stderr
    assert "mismatch" in run.stdout + run.stderr
