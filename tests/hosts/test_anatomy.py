"""Parts of a transformer are found by structure, whatever the model calls them."""

import pytest
import torch
import transformers as hf
from torch import nn

from eckart.errors import EckartError
from eckart.hosts import anatomy, host, is_conv1d, linear_layers, map_of, offset_of, replace
from eckart.maps import Dense

EXPECTED = {  # blocks, embedding, head, tied, linear layers of the first block
    "llama": ("model.layers", "model.embed_tokens", "lm_head", False, 7),
    "llama-tied": ("model.layers", "model.embed_tokens", "lm_head", True, 7),
    "mistral": ("model.layers", "model.embed_tokens", "lm_head", False, 7),
    "qwen2": ("model.layers", "model.embed_tokens", "lm_head", False, 7),
    "gemma2": ("model.layers", None, "lm_head", False, 7),  # its table scales what it looks up: not a plain embedding
    "phi3": ("model.layers", "model.embed_tokens", "lm_head", False, 4),
    "gpt-neox": ("gpt_neox.layers", "gpt_neox.embed_in", "lm_head", False, 4),
    "gpt2": ("transformer.h", "transformer.wte", "lm_head", True, 4),
    "gpt-neo": ("transformer.h", "transformer.wte", "lm_head", True, 6),
    "opt": ("model.decoder.layers", "model.decoder.embed_tokens", "lm_head", True, 6),
    "opt-projected": ("model.decoder.layers", "model.decoder.embed_tokens", "lm_head", True, 6),
    "bloom": ("transformer.h", "transformer.word_embeddings", "lm_head", True, 4),
    "bert": ("bert.encoder.layer", "bert.embeddings.word_embeddings", "cls.predictions.decoder", True, 6),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_parts(tiny, name):
    blocks, embedding, head, tied, count = EXPECTED[name]
    model = tiny(name)
    parts = anatomy(model)
    assert parts.blocks == tuple(f"{blocks}.{i}" for i in range(len(parts.blocks)))
    assert len(parts.blocks) == len(model.get_submodule(blocks))
    assert (parts.embedding, parts.head, parts.tied) == (embedding, head, tied)
    block = parts.blocks[0]
    layers = linear_layers(model.get_submodule(block), block)
    assert len(layers) == count
    for layer, module in layers.items():
        assert model.get_submodule(layer) is module


def test_parts_on_the_meta_device(tiny):
    model = tiny("llama-tied")
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.tie_weights()
    assert anatomy(empty) == anatomy(model)


def test_encoder_decoder_is_refused():
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60)
    with pytest.raises(EckartError, match=r"several stacks of blocks.*only decoders and encoders"):
        anatomy(hf.T5ForConditionalGeneration(config))


def test_no_blocks_is_refused():
    with pytest.raises(EckartError, match="Sequential has no list of equal blocks"):
        anatomy(nn.Sequential(nn.Linear(3, 3)))
    lists = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(20, 20)]), "b": nn.ModuleList([nn.ReLU()])})
    with pytest.raises(EckartError, match="ModuleDict has no list of equal blocks"):
        anatomy(lists)


def test_blocks_of_different_classes_are_refused():
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(20, 20)), nn.TransformerEncoderLayer(20, 2)])
    with pytest.raises(EckartError, match="no list of equal blocks"):
        anatomy(nn.ModuleDict({"layers": blocks}))


def test_a_subclass_of_linear_is_not_a_plain_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"plain": nn.Linear(20, 20), "own": Doubled(20, 20)})
    assert list(linear_layers(model)) == ["plain"]


def test_narrow_layers_are_left_alone():
    model = nn.ModuleDict({"router": nn.Linear(64, 8), "gate": nn.Linear(10, 64), "up": nn.Linear(11, 64)})
    assert list(linear_layers(model, "mlp")) == ["mlp.up"]


def test_a_layer_itself_is_found_under_its_own_name():
    layer = nn.Linear(20, 20)
    assert linear_layers(layer, "head") == {"head": layer}


def test_conv1d_is_a_transposed_linear_layer(tiny):
    layer = tiny("gpt2").transformer.h[0].mlp.c_fc
    assert is_conv1d(layer)
    x = torch.randn(5, 32)
    twin = host(map_of(layer), offset_of(layer))
    torch.testing.assert_close(twin(x), layer(x), atol=1e-6, rtol=0)
    assert map_of(layer).shape == (128, 32)


def test_replace_keeps_the_mode_and_returns_the_old_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Dropout())).eval()
    old, new = model[0][0], host(Dense(torch.zeros(3, 3)))
    assert new.training
    assert replace(model, "0.0", new) is old
    assert model[0][0] is new
    assert not new.training
