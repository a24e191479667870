"""Hidden units are found by what layers do, in every kind of block."""

import pytest
import torch
import transformers as hf
from torch import nn

from eckart.hosts import anatomy
from eckart.hosts.neurons import neurons_of

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 48, "max_position_embeddings": 40}
# hidden units as many as channels, and no shared heads: shapes alone tell nothing
SQUARE = SMALL | {"intermediate_size": 32, "max_position_embeddings": 40}
BERT = (("intermediate.dense",), "output.dense")
LLAMA = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
MODELS = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)), [LLAMA]),
    "llama-square": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SQUARE)), [LLAMA]),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=60, n_positions=40)),
        [(("mlp.c_fc",), "mlp.c_proj")],
    ),
    "bert-square": (lambda: hf.BertModel(hf.BertConfig(**SQUARE)), [BERT]),
    "gpt-j-parallel": (
        lambda: hf.GPTJForCausalLM(
            hf.GPTJConfig(vocab_size=60, n_embd=32, n_layer=1, n_head=4, rotary_dim=8, n_positions=40, n_inner=32)
        ),
        [(("mlp.fc_in",), "mlp.fc_out")],
    ),
    "phi3-fused": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**WIDE, pad_token_id=0)), []),
}


def block_and_run(model: nn.Module):
    """The model's block, and a function that runs the model and returns what the block gives."""
    block, out = model.get_submodule(anatomy(model).blocks[0]), []
    block.register_forward_hook(lambda m, a, o: out.append(o if isinstance(o, torch.Tensor) else o[0]))

    def run() -> torch.Tensor:
        model(torch.arange(5, 13)[None])
        return out.pop()

    return block, run


@pytest.mark.parametrize("name", MODELS)
def test_the_units_of_every_kind_of_block(name):
    torch.manual_seed(0)
    make, expected = MODELS[name]
    model = make().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = neurons_of(*block_and_run(model))
    assert [(group.into, group.out_of) for group in found] == expected
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Odd(nn.Module):
    """A block whose units have something of their own that fewer units would not fit."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale = nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).relu()
        if self.kind == "scaled":
            h = h * self.scale
        elif self.kind == "mixed":
            h = h - h.mean(-1, keepdim=True)
        y = self.down(h)
        return y + h[..., :16] if self.kind == "read twice" else y


@pytest.mark.parametrize(("kind", "count"), [("plain", 1), ("scaled", 0), ("mixed", 0), ("read twice", 0)])
def test_units_that_cannot_be_deleted_are_left_out(kind, count):
    torch.manual_seed(0)
    block, x = Odd(kind), torch.randn(1, 6, 16)
    assert len(neurons_of(block, lambda: block(x))) == count
