"""Compressed folders as transformers load them: with nothing but transformers, or not at all; never wrongly."""

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import eckart
from eckart.errors import EckartError
from eckart.files.entries import EckartConfig, check_files, expected_tensors, sentinel_name
from eckart.files.folder import SINGLE
from eckart.files.huggingface import EckartQuantizer, localized, register
from eckart.hosts import EmbeddingHost, Host, TiedHead, map_of

DEMO = Path(str(files("eckart"))) / "demo" / "stories260k"
IDS = torch.arange(1, 41).view(2, 20)
KINDS = {
    "lowrank": {"storage": "lowrank"},
    "pivoted": {"storage": "pivoted"},
    "everything": {"storage": "pivoted", "embeddings": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The demonstration model compressed without data: low-rank, pivoted, and with its tied embedding."""
    parent = tmp_path_factory.mktemp("compressed")
    for kind, settings in KINDS.items():
        eckart.compress(DEMO, parent / kind, method="svd", keep=0.7, settings=settings)
    return {kind: parent / kind for kind in KINDS}


@pytest.fixture(params=list(KINDS))
def folder(request, folders) -> Path:
    return folders[request.param]


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    """A folder with its embedding compressed too, to be damaged."""
    return Path(shutil.copytree(folders["everything"], tmp_path / "copy"))


def load(folder: Path, auto=hf.AutoModelForCausalLM):
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


SCRIPT = """
import sys
{first}
import torch
import transformers
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.arange(1, 41).view(2, 20)).logits, sys.argv[2])
"""


def run(first: str, folder: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first), folder, out],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("first", ["", "import eckart"])
def test_a_fresh_process_gives_the_same_logits_with_and_without_importing_eckart(first, folders, tmp_path):
    done = run(first, folders["everything"], tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(load(folders["everything"])))


def test_without_eckart_loading_stops_with_an_error(folders, tmp_path):
    done = run("", folders["lowrank"], tmp_path / "logits.pt", ECKART_AUTOLOAD="0")
    assert done.returncode != 0
    assert not (tmp_path / "logits.pt").exists()
    assert "mismatch" in done.stderr.lower()


def test_every_sentinel_stands_for_a_dense_weight(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    dense = load_file(DEMO / SINGLE)
    sentinel = load_file(folder / SINGLE)[config["sentinel"]]
    assert sentinel.numel() == 0
    assert dense[config["sentinel"]].shape != sentinel.shape
    assert config["sentinel"].removesuffix(".weight") in config["layers"]


def test_hosts_are_where_the_config_says(folder):
    model = load(folder)
    entries = model.config.quantization_config.layers
    assert entries
    for name, entry in entries.items():
        module = model.get_submodule(name)
        expected = {"linear": Host, "embedding": EmbeddingHost, "tied-head": TiedHead}[entry["kind"]]
        assert isinstance(module, expected)
        if entry["kind"] == "linear":
            assert map_of(module).spec() == entry["map"]


def test_dense_maps_give_the_same_logits(folder):
    """The map of every layer, made dense in a plain model, is what the loaded folder computes."""
    model, plain = load(folder), load(DEMO)
    for name, module in plain.named_modules():
        made = model.get_submodule(name)
        if isinstance(made, Host):
            module.weight.data = map_of(made).dense()
        elif isinstance(made, EmbeddingHost):
            module.weight.data.copy_(made.dense())
    torch.testing.assert_close(logits(model), logits(plain), atol=2e-4, rtol=1e-4)


def test_saving_a_loaded_model_gives_the_same_folder(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    first, again = load_file(folder / SINGLE), load_file(tmp_path / "again" / SINGLE)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert after["quantization_config"] == before["quantization_config"]


def test_saving_in_shards(folder, tmp_path):
    load(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(load(folder)))


def test_half_precision(folder):
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()


def test_the_body_of_a_decoder_is_loaded_from_its_folder(folder):
    body, whole = load(folder, hf.AutoModel), load(folder)
    with torch.no_grad():
        got, expected = (m(IDS, output_hidden_states=True).hidden_states[-1] for m in (body, whole))
    assert torch.equal(got, expected)


def test_a_decoder_is_loaded_from_the_folder_of_its_body(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlamaConfig(**sizes, intermediate_size=48, tie_word_embeddings=True)
    hf.LlamaModel(config).save_pretrained(tmp_path / "body")
    eckart.compress(tmp_path / "body", tmp_path / "out", method="svd", keep=0.7)
    body, whole = load(tmp_path / "out", hf.AutoModel), load(tmp_path / "out")
    with torch.no_grad():
        got, expected = (m(IDS % 40, output_hidden_states=True).hidden_states[-1] for m in (body, whole))
    assert torch.equal(got, expected)


def test_generation_and_training_work(folder):
    model = load(folder)
    out = model.generate(IDS[:1, :4], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (1, 9)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.parameters()) > 10


def test_dequantizing_gives_a_plain_model(folder, tmp_path):
    model = load(folder)
    before = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(m, Host | EmbeddingHost | TiedHead) for m in dense.modules())
    torch.testing.assert_close(logits(dense), before, atol=2e-4, rtol=1e-4)


NAME = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format=99), "this folder has format 99, but this version of eckart reads 1; update eckart"),
        (lambda q: q["layers"][NAME]["map"].update(op="Magic"), r"the spec of layer '{name}' is invalid"),
        (lambda q: q["layers"][NAME].pop("map"), "the spec of layer '{name}' is invalid"),
        (lambda q: q["layers"].update({"model.layers.9.x": q["layers"][NAME]}), "has no layer 'model.layers.9.x' that"),
        (
            lambda q: q["layers"][NAME].update(kind="conv"),
            "layer '{name}' is of kind 'conv'; this version of eckart reads",
        ),
        (lambda q: q["layers"].update({NAME: 3}), "layer '{name}' is of kind None"),
        (lambda q: q.update(layers=[1]), "layers must be entries by module name, got a list"),
        (lambda q: q["layers"]["lm_head"].update(embedding=NAME), "'lm_head' is tied to '{name}', which is not a comp"),
    ],
    ids=["format", "family", "no-map", "unknown-layer", "kind", "no-entry", "no-entries", "tied"],
)
def test_a_config_that_does_not_fit_the_model(change, message, copy):
    edit(copy, change)
    with pytest.raises(EckartError, match=message.format(name=NAME)) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_model_of_other_sizes(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 200}))
    with pytest.raises(
        EckartError, match=r"is (200 x 64|64 x 200) in this model, but its spec is (172 x 64|64 x 172)$"
    ):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.basis.weight"), rf"lacks the tensor {NAME}.basis.weight that its config describes"),
        (
            lambda t: t.update({f"{NAME}.basis.weight": torch.zeros(3, 64)}),
            r"has shape \(3, 64\), but its spec says \(",
        ),
        (lambda t: t.pop(f"{NAME}.order"), rf"lacks the tensor {NAME}.order"),
        (lambda t: t.pop("model.embed_tokens.table.weight"), r"lacks the tensor model.embed_tokens.table.weight"),
    ],
)
def test_tensors_that_do_not_fit_their_spec(change, message, copy):
    tensors = load_file(copy / SINGLE)
    change(tensors)
    save_file(tensors, copy / SINGLE, {"format": "pt"})
    with pytest.raises(EckartError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [10_000, -1, 0])
def test_corrupt_orders_are_found_before_they_are_used(index, copy, tmp_path):
    tensors = load_file(copy / SINGLE)
    name = next(key for key in tensors if key.endswith("q_proj.order"))
    tensors[name][:2] = index
    save_file(tensors, copy / SINGLE, {"format": "pt"})
    message = rf"{name.removesuffix('.order').partition('.')[2]}' are corrupt: Pivoted: got an order"
    with pytest.raises(EckartError, match=message):
        load(copy)
    with pytest.raises(EckartError, match=message):
        eckart.densify(copy, tmp_path / "dense")


def test_a_dense_model_is_not_compressed_while_loading():
    with pytest.raises(
        EckartError, match=r"cannot be compressed by passing a quantization_config; use eckart\.compress"
    ):
        hf.AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=EckartConfig())


def test_the_sentinel_is_the_smallest_linear_layer():
    linear, table = {"kind": "linear"}, {"kind": "embedding"}
    assert sentinel_name({"z": linear, "b": linear, "a": table}) == "b.weight"
    assert sentinel_name({"a": table, "h": {"kind": "tied-head"}}) == "a.weight"
    assert sentinel_name({}) is None


def test_unknown_keys_of_later_minor_versions_are_kept():
    config = EckartConfig(layers={}, quant_method="eckart", elastic=True)
    assert config.elastic is True
    assert config.to_dict()["elastic"] is True


def test_registering_twice_does_nothing():
    register()
    register()
    assert EckartQuantizer.is_trainable


def test_expected_tensors_are_those_of_the_file(folder):
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    tensors = load_file(folder / SINGLE)
    expected = expected_tensors(layers)
    assert expected
    assert all(tuple(tensors[name].shape) == shape for name, shape in expected.items())
    check_files(str(folder / SINGLE), layers)
    check_files(None, layers)


def test_names_gain_or_lose_the_prefix_of_the_base_model(folders):
    layers = {
        "model.layers.0.mlp.up_proj": {"kind": "linear"},
        "lm_head": {"kind": "tied-head", "embedding": "model.x"},
    }
    body = load(DEMO, hf.AutoModel)
    assert list(localized(body, layers)) == ["layers.0.mlp.up_proj"]
    assert list(localized(load(DEMO), {"layers.0.mlp.up_proj": {"kind": "linear"}})) == ["model.layers.0.mlp.up_proj"]


def test_dequantizing_gpt2_gives_its_own_transposed_layers_again(tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=60, bos_token_id=0, eos_token_id=0
    )
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    eckart.compress(tmp_path / "gpt2", tmp_path / "small", method="svd", keep=0.8)
    model = load(tmp_path / "small")
    before = logits(model)
    model.dequantize().save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), before, atol=1e-5, rtol=1e-5)


def test_dequantizing_warns_of_biases_that_the_dense_class_has_no_place_for(tmp_path):
    text = DEMO.parent / "train.txt"
    eckart.compress(
        DEMO, tmp_path / "small", method="afm", keep=0.7, calibration=text, samples=4, length=32, cache=False
    )
    with pytest.warns(eckart.errors.NumericalWarning, match="have gained a bias that the dense class may not load"):
        load(tmp_path / "small").dequantize()
