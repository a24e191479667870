"""Heads are found by what layers do, in every kind of attention, and not where a head cannot have fewer channels."""

import pytest
import torch
import transformers as hf

from eckart.hosts import Heads, anatomy, heads_of

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 48, "max_position_embeddings": 40}
GROUPED = WIDE | {"num_key_value_heads": 2}
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
GPTJ = {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40, "n_inner": 32}
BERT = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**WIDE), Heads(QKV, "self_attn.o_proj", 8, 4, 4, "halves")),
    "llama-grouped": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**GROUPED),
        Heads(QKV, "self_attn.o_proj", 8, 4, 2, "halves"),
    ),
    "llama-wide-heads": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**GROUPED, head_dim=12),
        Heads(QKV, "self_attn.o_proj", 12, 4, 2, "halves"),
    ),
    "qwen2-with-biases": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**GROUPED),
        Heads(QKV, "self_attn.o_proj", 8, 4, 2, "halves"),
    ),
    "qwen3-norms-of-heads": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=8), None),
    "phi3-fused": (
        hf.Phi3ForCausalLM,
        hf.Phi3Config(**GROUPED, pad_token_id=0),
        Heads(("self_attn.qkv_proj",), "self_attn.o_proj", 8, 4, 2, "halves"),
    ),
    "gpt2-fused": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=60, n_positions=40),
        Heads(("attn.c_attn",), "attn.c_proj", 8, 4, 4, "single"),
    ),
    "gpt-j": (
        hf.GPTJForCausalLM,
        hf.GPTJConfig(**GPTJ, rotary_dim=4),
        Heads(("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.out_proj", 8, 4, 4, "neighbours"),
    ),
    "gpt-neox-interleaved-rows": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**WIDE),
        None,
    ),
    "bert": (hf.BertModel, hf.BertConfig(**WIDE), Heads(BERT, "attention.output.dense", 8, 4, 4, "single")),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_heads_of_every_kind_of_block(name):
    torch.manual_seed(0)
    make, config, expected = MODELS[name]
    model = make(config).eval()
    block, out = model.get_submodule(anatomy(model).blocks[0]), []
    block.register_forward_hook(lambda m, a, o: out.append(o if isinstance(o, torch.Tensor) else o[0]))

    def run() -> torch.Tensor:
        model(torch.arange(5, 13)[None])
        return out.pop()

    keys = getattr(config, "num_key_value_heads", None) or 4
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = run()
    size = getattr(config, "head_dim", None) or 8
    assert heads_of(block, run, size, 4, keys) == expected
    assert heads_of(block, run, 2 * size, 2, max(keys // 2, 1)) is None  # what a config might say in error
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(run(), plain)
