"""Folders whose layers share tensors: stored and counted once, one parameter in memory, dense again on request."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eckart.errors import EckartError
from eckart.files.folder import SINGLE
from eckart.files.inspect import densify, show
from eckart.files.writing import LayerRecord
from eckart.hosts import host, map_of, replace
from eckart.maps import Dense, LinearMap, LowRank, Product, bitmap

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(1, 13).view(2, 6)
LAYERS = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"
Q0, Q1, Q2 = (LAYERS[0].format(i) for i in range(3))
UP0, UP2 = (LAYERS[1].format(i) for i in (0, 2))


def maps() -> dict[str, tuple[LinearMap, str, str]]:
    """Maps by layer, with the key of the shared tensor and its owner: three layers share a basis, two a dictionary."""
    torch.manual_seed(1)
    basis, atoms = torch.randn(5, 16) / 4, torch.randn(6, 16) / 4
    made: dict[str, tuple[LinearMap, str, str]] = {}
    for name in (Q0, Q1, Q2):
        made[name] = LowRank(torch.randn(16, 5) / 4, basis), "down.weight", Q0
    for name in (UP0, UP2):
        made[name] = Product((bitmap(torch.randn(24, 6), 3), Dense(atoms))), "1.weight", UP0
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in the format of `eckart.files.huggingface`, written by hand."""
    out = tmp_path_factory.mktemp("shared") / "folder"
    out.mkdir()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=32)).eval()
    layers, left_out = {}, set()
    for name, (map_, key, owner) in maps().items():
        replace(model, name, host(map_))
        layers[name] = {"kind": "linear", "map": map_.spec(), "bias": False}
        if name != owner:
            layers[name]["shared"] = {key: owner}
            left_out.add(f"{name}.{key}")
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name not in left_out}
    sentinel = min(layers) + ".weight"
    save_file(tensors | {sentinel: torch.empty(0)}, out / SINGLE, {"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]}
    config["quantization_config"] = {"quant_method": "eckart", "format": 1, "layers": layers, "sentinel": sentinel}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(path: Path, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(path, **({"dtype": torch.float32} | options)).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def dense_logits(folder: Path) -> torch.Tensor:
    """What a plain model with the maps' dense weights computes."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=32)).eval()
    for name, (map_, _, _) in maps().items():
        plain.get_submodule(name).weight.data = map_.dense()
    return logits(plain)


def assert_tied(model, prefix: str = "") -> None:
    for name, (_, key, owner) in maps().items():
        mine, theirs = (f"{layer.removeprefix(prefix)}.{key}" for layer in (name, owner))
        assert model.get_parameter(mine) is model.get_parameter(theirs), name


def test_loaded_layers_hold_one_parameter_and_compute_the_same(folder):
    model = load(folder)
    assert_tied(model)
    torch.testing.assert_close(logits(model), dense_logits(folder), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == show(folder).parameters
    assert_tied(copy.deepcopy(model))
    assert_tied(model.to(torch.bfloat16))


def test_nothing_is_missing_or_random(folder):
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_body_is_loaded_with_its_shared_tensors(folder):
    body = load(folder, AutoModel)
    assert_tied(body, "model.")
    with torch.no_grad():
        got, expected = (m(IDS, output_hidden_states=True).hidden_states[-1] for m in (body, load(folder)))
    assert torch.equal(got, expected)
    assert_tied(load(folder, dtype=torch.bfloat16))


def test_saving_gives_the_same_folder(folder, tmp_path):
    model = load(folder)
    for name, options in (("whole", {}), ("shards", {"max_shard_size": "3KB"})):
        model.save_pretrained(tmp_path / name, **options)
        again = load(tmp_path / name)
        assert_tied(again)
        assert torch.equal(logits(again), logits(model))
    first, second = load_file(folder / SINGLE), load_file(tmp_path / "whole" / SINGLE)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2


def test_a_tensor_that_is_no_longer_shared_is_not_lost_in_silence(folder, tmp_path):
    model = load(folder)
    down = model.get_submodule(Q1).down
    down.weight = torch.nn.Parameter(down.weight.detach() + 1)
    with pytest.raises(EckartError, match=rf"{Q1}.down.weight was shared with {Q0}.down.weight and is not any more"):
        model.save_pretrained(tmp_path / "again")


def test_training_moves_the_one_parameter(folder, tmp_path):
    model = load(folder).train()
    model(IDS, labels=IDS).loss.backward()
    shared = model.get_parameter(f"{Q0}.down.weight")
    parts = []
    for name in (Q0, Q1, Q2):  # the gradient is the sum over the layers
        alone = load(folder).train()
        for other in {Q0, Q1, Q2} - {name}:
            down = alone.get_submodule(other).down
            down.weight = torch.nn.Parameter(down.weight.detach().clone())
        alone(IDS, labels=IDS).loss.backward()
        parts.append(alone.get_parameter(f"{name}.down.weight").grad)
    torch.testing.assert_close(shared.grad, sum(parts), atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        shared -= 0.1 * shared.grad
    model.eval().save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(load(tmp_path / "trained")), logits(model))


def test_shared_numbers_are_counted_with_their_owner_alone(folder):
    contents = show(folder)
    numbers = {layer.name: layer.numbers for layer in contents.layers}
    assert numbers == {Q0: 16 * 5 + 5 * 16, Q1: 80, Q2: 80, UP0: 24 * 3 + 6 * 16, UP2: 72}
    assert contents.nbytes == sum(t.nbytes for t in load_file(folder / SINGLE).values())
    dense = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert contents.dense_parameters == sum(p.numel() for p in dense.parameters())


def test_records_count_a_shared_tensor_with_its_owner_alone():
    (map_, _, _), (taker, key, owner) = maps()[Q0], maps()[Q1]
    own, other = (
        LayerRecord.of(Q0, map_, None, 0.0),
        LayerRecord.of(Q1, taker, torch.zeros(16), 0.0, shared={key: owner}),
    )
    assert (own.numbers, other.numbers) == (160, 80 + 16)
    assert (own.nbytes, other.nbytes) == (640, 4 * 96)
    assert "shared" not in own.entry
    assert other.entry["shared"] == {"down.weight": Q0}


def test_densifying_unfolds_every_layer(folder, tmp_path):
    densify(folder, tmp_path / "dense")
    model = load(tmp_path / "dense")
    assert type(model.get_submodule(Q1)) is torch.nn.Linear
    torch.testing.assert_close(logits(model), dense_logits(folder), atol=1e-5, rtol=1e-5)


def test_dequantizing_unties(folder, tmp_path):
    model = load(folder).dequantize()
    weights = [model.get_parameter(f"{name}.weight") for name in (Q0, Q1)]
    assert weights[0].data_ptr() != weights[1].data_ptr()
    model.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense")), dense_logits(folder), atol=1e-5, rtol=1e-5)
    assert map_of(model.get_submodule(Q2)).shape == (16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[Q1].update(shared={"down.weight": UP0}), "takes 'down.weight' from '{up}', which does not own"),
        (lambda e: e[Q1].update(shared={"down.weight": Q2}), "takes 'down.weight' from '{q2}', which does not own"),
        (lambda e: e[Q1].update(shared={"down.weight": "model.x"}), "'model.x'"),
        (lambda e: e[Q1].update(shared={"left.weight": Q0}), "is invalid: it has no tensor 'left.weight' to share"),
        (lambda e: e[Q1].update(shared=3), "is invalid: 'shared' must be layers by tensor, got 3"),
        (lambda e: e[Q1].update(shared={"down.weight": 1}), "is invalid: 'shared' must be layers by tensor, got"),
        (
            lambda e: e[Q1]["map"].update(up=[16, 4], down=[4, 16]),
            r"of shape \(4, 16\) from '{q0}', where it is \(5, 16",
        ),
        (lambda e: e[Q1].pop("shared"), "lacks the tensor {q1}.down.weight that its config describes"),
    ],
    ids=[
        "no-such-tensor",
        "not-the-owner",
        "no-such-layer",
        "no-such-key",
        "no-mapping",
        "no-name",
        "shape",
        "not-said",
    ],
)
def test_sharing_that_does_not_fit(change, message, damaged, tmp_path):
    config = json.loads((damaged / "config.json").read_text())
    change(config["quantization_config"]["layers"])
    (damaged / "config.json").write_text(json.dumps(config))
    names = {"q0": re.escape(Q0), "q1": re.escape(Q1), "q2": re.escape(Q2), "up": re.escape(UP0)}
    for read in (load, show, lambda path: densify(path, tmp_path / "dense")):
        with pytest.raises(EckartError, match=message.format(**names)) as caught:
            read(damaged)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "dense").exists()
