"""Looking into compressed folders without reading weights, and making them dense again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from eckart.errors import EckartError
from eckart.files import shards
from eckart.files.inspect import densify, show
from eckart.hosts import EmbeddingHost, TiedHead, host, map_of, offset_of, replace
from eckart.maps import LowRank, pivot

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(1, 13).view(2, 6)


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=32, **options)).eval()


def truncated(weight: torch.Tensor, rank: int) -> LowRank:
    u, s, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return LowRank(u[:, :rank] * s[:rank], v[:rank])


def write_compressed(
    model: PreTrainedModel,
    folder: Path,
    ranks: dict[str, int],
    *,
    pivoted: bool = False,
    bias: bool = False,
    embedding: str | None = None,
    head: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Truncate layers of a model in place and write it in the format of `eckart.files.entries`."""
    layers = {}
    for name, rank in ranks.items():
        module = model.get_submodule(name)
        low = truncated(map_of(module).dense() if name != embedding else module.weight, rank)
        map_ = pivot(low) if pivoted else low
        if name == embedding:
            map_ = pivot(low, "columns") if pivoted else low
            replace(model, name, EmbeddingHost(map_))
            layers[name] = {"kind": "embedding", "map": map_.spec(), "padding_idx": None}
            continue
        offset = offset_of(module)
        offset = torch.linspace(-1, 1, map_.shape[0]) if bias and offset is None else offset
        replace(model, name, host(map_, offset))
        layers[name] = {"kind": "linear", "map": map_.spec(), "bias": offset is not None}
    if head:
        replace(model, head, TiedHead(model.get_submodule(embedding)))
        layers[head] = {"kind": "tied-head", "embedding": embedding}
    sentinel = min(name for name in layers if name != head) + ".weight"
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings and embedding is None:
        tensors.pop("lm_head.weight", None)
    tensors[sentinel] = torch.empty(0)
    folder.mkdir()
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    if head:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = {
        "quant_method": "eckart",
        "format": 1,
        "layers": layers,
        "sentinel": sentinel,
        "tied": head is not None,
        "made_by": {"method": "svd", "keep": 0.5},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("a companion\n")
    return folder


QKV = {f"model.layers.{i}.self_attn.{p}_proj": 3 + i for i in range(2) for p in "qv"}
CASES = {
    "low-rank": lambda path: write_compressed(llama(), path, QKV),
    "biases": lambda path: write_compressed(llama(), path, {**QKV, "model.layers.1.mlp.up_proj": 4}, bias=True),
    "tied, everything pivoted": lambda path: write_compressed(
        llama(tie_word_embeddings=True),
        path,
        {**QKV, "model.embed_tokens": 5},
        pivoted=True,
        embedding="model.embed_tokens",
        head="lm_head",
    ),
    "tied, embedding untouched": lambda path: write_compressed(llama(tie_word_embeddings=True), path, QKV),
    "transposed storage": lambda path: write_compressed(
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval(),
        path,
        {"transformer.h.0.attn.c_attn": 3, "transformer.h.1.mlp.c_fc": 4},
        pivoted=True,
    ),
    "encoder": lambda path: write_compressed(
        BertModel(BertConfig(**SMALL, max_position_embeddings=32)).eval(),
        path,
        {"encoder.layer.0.attention.self.query": 3, "embeddings.word_embeddings": 4},
        embedding="embeddings.word_embeddings",
    ),
}

# Loads folders where eckart cannot be imported, and saves what the models compute.
WITHOUT_ECKART = """
import sys
sys.modules["eckart"] = None
import torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
answers = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    auto = AutoModel if folder.name == "encoder" else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {key: sorted(names) for key, names in info.items() if names}
    assert not wrong, (folder.name, wrong)
    with torch.no_grad():
        answer = model.eval()(input_ids=torch.arange(1, 13).view(2, 6))
    answers[folder.name] = (answer.last_hidden_state if folder.name == "encoder" else answer.logits).contiguous()
save_file(answers, sys.argv[2])
"""


def answers_without_eckart(folders: Path, out: Path) -> dict[str, torch.Tensor]:
    environment = {**os.environ, "ECKART_AUTOLOAD": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", WITHOUT_ECKART, str(folders), str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return load_file(out)


@torch.no_grad()
def answer(folder: Path, auto: str) -> torch.Tensor:
    if auto == "AutoModel":
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).last_hidden_state
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits


def test_dense_folders_compute_the_same_without_eckart(tmp_path) -> None:
    expected = {}
    for case, make in CASES.items():
        folder, dense = make(tmp_path / case), tmp_path / "dense" / case
        expected[case] = answer(folder, "AutoModel" if case == "encoder" else "AutoModelForCausalLM")
        assert densify(folder, dense) == dense
        assert "quantization_config" not in json.loads((dense / "config.json").read_text())
        assert (dense / "vocab.txt").read_text() == "a companion\n"
    assert sorted(p.name for p in (tmp_path / "dense").iterdir()) == sorted(CASES), "left something behind"
    found = answers_without_eckart(tmp_path / "dense", tmp_path / "answers.safetensors")
    for case in CASES:
        assert (found[case] - expected[case]).abs().max() < 1e-5, case


def test_ties_are_restored(tmp_path) -> None:
    densify(CASES["tied, everything pivoted"](tmp_path / "small"), tmp_path / "dense")
    assert json.loads((tmp_path / "dense/config.json").read_text())["tie_word_embeddings"] is True
    tensors = load_file(tmp_path / "dense/model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (40, 16)
    assert "lm_head.weight" not in tensors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtypes_are_kept_tensor_by_tensor(tmp_path) -> None:
    folder = write_compressed(llama(), tmp_path / "small", QKV, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    densify(folder, tmp_path / "dense")
    dense = load_file(tmp_path / "dense/model.safetensors")
    assert dense.pop("model.norm.weight").dtype == torch.float32
    assert {t.dtype for t in dense.values()} == {torch.bfloat16}


def test_large_folders_are_written_in_shards(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    folder = CASES["low-rank"](tmp_path / "small")
    seen = []
    densify(folder, tmp_path / "dense", lambda stage, done, total: seen.append((stage, done, total)))
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 2
    assert torch.equal(
        answer(tmp_path / "dense", "AutoModelForCausalLM").argmax(-1), answer(folder, "AutoModelForCausalLM").argmax(-1)
    )
    total = seen[-1][2]
    assert seen == [("densify", i, total) for i in range(total + 1)]


def test_a_bias_without_a_place_is_refused_before_anything_is_written(tmp_path) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=32))
    folder = write_compressed(model, tmp_path / "small", {"model.layers.0.mlp.up_proj": 3}, bias=True)
    with pytest.raises(EckartError, match=r"MistralForCausalLM has no place.*bias=false"):
        densify(folder, tmp_path / "dense")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_what_a_folder_holds(tmp_path) -> None:
    folder = CASES["tied, everything pivoted"](tmp_path / "small")
    contents = show(folder)
    assert contents.architecture == "LlamaForCausalLM"
    assert contents.layers[0].name == "model.embed_tokens"
    assert len(contents.layers) == 5
    embedding, query = contents.layers[0], contents.layers[1]
    assert (embedding.kind, embedding.structure, embedding.shape, embedding.rank) == (
        "embedding",
        "pivoted",
        (40, 16),
        5,
    )
    assert embedding.numbers == 5 * (40 + 16 - 5)
    assert embedding.nbytes == 4 * embedding.numbers + 4 * 16
    assert embedding.dense_numbers == 640
    assert (query.name, query.rank, query.numbers) == ("model.layers.0.self_attn.q_proj", 3, 3 * (16 + 16 - 3))
    dense = llama(tie_word_embeddings=True)
    assert contents.dense_parameters == sum(p.numel() for p in dense.parameters())
    assert contents.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert contents.made_by == {"method": "svd", "keep": 0.5}
    assert json.loads(json.dumps(contents.as_dict()))["layers"][0]["shape"] == [40, 16]


def test_layers_come_in_numeric_order(tmp_path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 11}))
    folder = write_compressed(model, tmp_path / "small", {f"model.layers.{i}.self_attn.q_proj": 3 for i in range(11)})
    assert [int(layer.name.split(".")[2]) for layer in show(folder).layers] == list(range(11))


def test_added_biases_are_counted_against_a_layer_without(tmp_path) -> None:
    layer = show(CASES["biases"](tmp_path / "small")).layers[0]
    assert layer.numbers == 3 * (16 + 16) + 16
    assert layer.dense_numbers == 16 * 16


def test_a_dense_folder_has_no_compressed_layers(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    contents = show(tmp_path / "dense")
    assert contents.layers == ()
    assert contents.parameters == contents.dense_parameters == sum(p.numel() for p in llama().parameters())
    with pytest.raises(EckartError, match="not compressed by eckart"):
        densify(tmp_path / "dense", tmp_path / "out")


def test_no_weight_is_read(tmp_path, monkeypatch) -> None:
    folder = CASES["low-rank"](tmp_path / "small")
    monkeypatch.setattr("eckart.files.folder.TensorFile.read", lambda *a: pytest.fail("a weight was read"))
    assert len(show(folder).layers) == 4


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def other_rank(config) -> None:
    config["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"]["map"]["up"] = [16, 9]
    config["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"]["map"]["down"] = [9, 16]


def other_name(config) -> None:
    layers = config["quantization_config"]["layers"]
    layers["model.layers.7.self_attn.q_proj"] = layers.pop("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("verb", [show, lambda folder: densify(folder, folder.parent / "out")], ids=["show", "densify"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_config(f, other_rank), r"q_proj\.(up|down)\.weight in .* has shape"),
        (lambda f: edit_config(f, other_name), r"lacks the tensor model\.layers\.7"),
        (lambda f: edit_config(f, lambda c: c["quantization_config"].update(format=9)), "has format 9"),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"].update(quant_method="gptq")),
            "quantized by 'gptq'",
        ),
        (lambda f: edit_config(f, lambda c: c.update(architectures=["NoSuchModel"])), "needs the class NoSuchModel"),
        (lambda f: edit_config(f, lambda c: c.update(hidden_size=32)), "is 16 x 32 in this model"),
        (lambda f: edit_config(f, lambda c: c.update(num_hidden_layers=1)), "has no layer 'model.layers.1"),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"]["layers"].update(x=3)),
            "layer 'x' is",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 3000), "damaged or incomplete"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
    ],
)
def test_damage_is_named_and_nothing_is_written(verb, damage, message, tmp_path) -> None:
    folder = CASES["low-rank"](tmp_path / "small")
    damage(folder)
    with pytest.raises(EckartError, match=message):
        verb(folder)
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_left_alone(tmp_path) -> None:
    folder = CASES["low-rank"](tmp_path / "small")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(EckartError, match="already holds something"):
        densify(folder, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out/mine").unlink()
    densify(folder, tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()


def test_an_interrupted_run_leaves_nothing(tmp_path) -> None:
    folder = CASES["low-rank"](tmp_path / "small")

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        densify(folder, tmp_path / "out", interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
