"""Tiny transformers with random weights, built from config classes alone."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
GROUPED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama-tied": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "gemma2": lambda: hf.Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    "phi3": lambda: hf.Phi3Config(**GROUPED, pad_token_id=0),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=60, n_positions=40),
    "opt": lambda: hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1),
    "opt-projected": lambda: hf.OPTConfig(
        **SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False, pad_token_id=1
    ),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        vocab_size=60,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=60),
    "bert": lambda: hf.BertConfig(**SMALL, intermediate_size=48),
}
MASKED = {"bert"}


def build(name: str) -> nn.Module:
    config = CONFIGS[name]()
    torch.manual_seed(3)
    made = (hf.AutoModelForMaskedLM if name in MASKED else hf.AutoModelForCausalLM).from_config(config)
    for parameter in made.parameters():  # biases start at zero and norms at one, which would hide mistakes with them
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture
def tiny() -> Callable[[str], nn.Module]:
    return build


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
