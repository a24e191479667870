"""Opening model folders: what is there is found, single tensors are read, and what is wrong is said in one sentence."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from eckart.errors import EckartError
from eckart.files.folder import INDEX, SINGLE, check_finite, check_model_folder, open_model, tensor_file
from eckart.progress import silent

DEMO = Path(str(files("eckart"))) / "demo" / "stories260k"
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the demonstration model, to be damaged."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def sharded(folder: Path) -> Path:
    """Rewrite a folder's tensors as several shards."""
    hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="300KB")
    (folder / SINGLE).unlink(missing_ok=True)
    assert (folder / INDEX).is_file()
    return folder


def test_every_tensor_of_the_model_is_found(folder):
    model, expected = open_model(folder), hf.AutoModelForCausalLM.from_pretrained(folder)
    state = expected.state_dict()
    assert model.names.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(model.read(name), tensor), name
        assert model.shape(name) == tuple(tensor.shape)
        assert model.stored_dtype(name) == torch.float32
    assert model.numel == sum(p.numel() for p in expected.parameters()) == 260032
    assert model.names["lm_head.weight"] == model.names["model.embed_tokens.weight"]
    assert all(p.device.type == "meta" for p in model.model.parameters())
    assert all(b.device.type == "cpu" for b in model.model.buffers())


def test_shards_are_read_as_one(folder):
    whole = open_model(DEMO)
    model = open_model(sharded(folder))
    assert len(set(model.tensors.files.values())) > 2
    assert all(torch.equal(model.read(name), whole.read(name)) for name in whole.names)
    assert check_finite(model, silent) == check_finite(whole, silent)


def test_what_lies_outside_the_blocks_is_listed_once(folder):
    model = open_model(folder)
    blocks = [f"model.layers.{i}" for i in range(5)]
    assert model.outside(blocks) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_loading_fills_a_module_in_float32(folder):
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    model = open_model(folder)
    layer = model.model.model.layers[0].mlp.up_proj
    model.load(layer, "model.layers.0.mlp.up_proj")
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, tensors["model.layers.0.mlp.up_proj.weight"].float())
    assert model.stored_dtype("model.layers.0.mlp.up_proj.weight") == torch.bfloat16


@pytest.mark.parametrize("has_head", [True, False])
def test_names_with_and_without_the_prefix_of_the_base_model(has_head, tmp_path):
    torch.manual_seed(0)
    made = hf.BertForMaskedLM(hf.BertConfig(**SMALL))
    made.save_pretrained(tmp_path / "model")
    if not has_head:  # BertModel told to read a file whose names start with "bert."
        edit_config(tmp_path / "model", architectures=["BertModel"])
        made.bert.pooler = None
        tensors = load_file(tmp_path / "model" / SINGLE)
        tensors |= {"bert.pooler.dense.weight": torch.zeros(16, 16), "bert.pooler.dense.bias": torch.zeros(16)}
        save_file(tensors, tmp_path / "model" / SINGLE, {"format": "pt"})
    model = open_model(tmp_path / "model")
    name = "bert.encoder.layer.1.output.dense.weight" if has_head else "encoder.layer.1.output.dense.weight"
    assert torch.equal(model.read(name), made.bert.encoder.layer[1].output.dense.weight)


def test_checkpoints_named_otherwise_are_loaded_whole_with_a_warning(tmp_path):
    torch.manual_seed(0)
    made = hf.BertForMaskedLM(hf.BertConfig(**SMALL))
    made.save_pretrained(tmp_path)
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
               for name, tensor in load_file(tmp_path / SINGLE).items()}  # fmt: skip
    save_file(renamed, tmp_path / SINGLE, {"format": "pt"})
    with pytest.warns(UserWarning, match="names its tensors differently"):
        model = open_model(tmp_path)
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert torch.equal(model.read(name), made.get_parameter(name))
    assert model.shape(name) == (16,)


def test_the_hash_follows_config_and_weights(folder):
    before = check_finite(open_model(folder), silent)
    assert check_finite(open_model(folder), silent) == before
    edit_config(folder, rms_norm_eps=1e-3)
    configured = check_finite(open_model(folder), silent)
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert len({before, configured, check_finite(open_model(folder), silent)}) == 3


def test_a_missing_folder(tmp_path):
    with pytest.raises(EckartError, match=r"there is no model folder .*nowhere; give the path of a folder with config"):
        open_model(tmp_path / "nowhere")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(EckartError, match=r"model has no config\.json; give the path of a Hugging Face model folder"):
        check_model_folder(tmp_path / "model")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(EckartError, match=r"has no config\.json; give the path"):
        open_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[1]", "should hold a JSON object, got a list"), ("\xff", "cannot be read")],
)
def test_a_corrupt_config(folder, content, message):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(EckartError, match=rf"config\.json {message}"):
        open_model(folder)


def test_an_unknown_kind_of_model(folder):
    edit_config(folder, model_type="llamma", architectures=["LlammaForCausalLM"])
    with pytest.raises(EckartError, match=r"transformers does not understand .*config\.json: .*llamma"):
        open_model(folder)


def test_an_unknown_class(folder):
    edit_config(folder, architectures=["LlamaForCausalTea"])
    with pytest.raises(EckartError, match="needs the class LlamaForCausalTea, which this version of transformers does"):
        open_model(folder)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_attention_heads": 7}, {"intermediate_size": -1}, {"rope_scaling": 3}]
)
def test_a_config_that_makes_no_model(folder, change):
    edit_config(folder, **change)
    with pytest.raises(EckartError) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder(tmp_path):
    config = hf.T5Config(vocab_size=40, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        EckartError, match="T5ForConditionalGeneration is an encoder-decoder; only decoders and encoders"
    ):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("method", "hint"), [("eckart", "densify it first"), ("bitsandbytes", "start from the full-precision model")]
)
def test_a_compressed_folder(folder, method, hint):
    edit_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(EckartError, match=rf"already compressed \(quant_method '{method}'\); {hint}"):
        open_model(folder)


def test_a_quantization_config_of_another_form(folder):
    edit_config(folder, quantization_config=None)
    assert open_model(folder).numel == 260032
    edit_config(folder, quantization_config="int8")
    with pytest.raises(EckartError, match="already compressed"):
        open_model(folder)


def test_no_weights(folder):
    (folder / SINGLE).unlink()
    with pytest.raises(EckartError, match=rf"has no {SINGLE} and no {INDEX}; is it a model folder"):
        open_model(folder)


def test_pickled_weights_only(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        EckartError, match="pickled weights only, which eckart does not read; convert them to safetensors"
    ):
        open_model(folder)


@pytest.mark.parametrize("size", [0, 4, 200, 500_000, -1])
def test_a_truncated_file(folder, size):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:size])
    with pytest.raises(EckartError, match=rf"{SINGLE} is damaged or incomplete .*; download or copy it again"):
        open_model(folder)


def test_a_truncated_shard(folder):
    last = sorted(sharded(folder).glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(EckartError, match=rf"{last.name} is damaged or incomplete"):
        open_model(folder)


def test_a_missing_shard(folder):
    last = sorted(sharded(folder).glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(EckartError, match=rf"lacks the shards {last.name} that its index names"):
        open_model(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": [1]}'])
def test_an_index_without_map(folder, index):
    (folder / INDEX).write_text(index)
    with pytest.raises(EckartError, match="has no weight_map; download or copy it again"):
        open_model(folder)


def test_an_index_that_names_what_its_shard_lacks(folder):
    index = json.loads((sharded(folder) / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(EckartError, match="is damaged or incomplete"):
        open_model(folder)


@pytest.mark.filterwarnings("ignore:.*names its tensors differently")
def test_weights_that_are_missing(folder):
    tensors = load_file(folder / SINGLE)
    tensors.pop("model.layers.3.mlp.up_proj.weight")
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(EckartError, match=r"lacks the weights model\.layers\.3\.mlp\.up_proj\.weight of LlamaFor"):
        open_model(folder)


def test_weights_of_another_shape(folder):
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(
        EckartError,
        match=r"do not fit its config\.json, for instance model\.norm\.weight .*; download or copy both again",
    ):
        open_model(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, bad):
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4:6] = bad
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(EckartError, match=r"model\.layers\.2\.mlp\.up_proj\.weight in .* holds 2 NaN or Inf values"):
        check_finite(open_model(folder), silent)


def test_reading_names_the_damaged_file(folder):
    tensors = tensor_file(folder)
    assert "model.norm.weight" in tensors
    assert "nothing" not in tensors
    assert tensors.read("model.norm.weight").shape == (64,)
    assert tensors.dtype("model.norm.weight") == torch.float32
