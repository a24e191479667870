"""Tiny transformers whose statistics are collected block by block, and the samples they run on."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from accelerate import init_empty_weights
from torch import Tensor, nn

from eckart.hosts import Blockwise, anatomy

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
GROUPED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 40}

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=60, n_positions=40, bos_token_id=1, eos_token_id=1)
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=40)),
    "bert-mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=40)),
    # so small that Jacobians of everything are at hand
    "smallest": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            vocab_size=11,
            max_position_embeddings=8,
            initializer_range=0.3,
        )
    ),
    "smallest-encoder": lambda: hf.BertModel(
        hf.BertConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=11,
            max_position_embeddings=8,
            initializer_range=0.3,
        )
    ),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(5)
    model = MAKERS[name]()
    for parameter in model.parameters():  # norms of one and biases of zero would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def runner_of(model: nn.Module) -> Blockwise:
    with init_empty_weights(include_buffers=False):
        skeleton = type(model)(model.config)
    skeleton.tie_weights()

    def load(module: nn.Module, name: str) -> None:
        for key, parameter in model.get_submodule(name)._parameters.items():
            module._parameters[key] = None if parameter is None else nn.Parameter(parameter.detach().clone(), False)

    return Blockwise(skeleton, anatomy(skeleton), load, torch.device("cpu"))


@pytest.fixture
def tiny() -> Callable[[str], nn.Module]:
    return make


@pytest.fixture
def streamed() -> Callable[[nn.Module], Blockwise]:
    """Turns a model into a skeleton whose weights are loaded from the model, block by block."""
    return runner_of


@pytest.fixture
def samples() -> list[Tensor]:
    """Three batches of unequal size and length."""
    torch.manual_seed(0)
    return [torch.randint(2, 60, size) for size in ((3, 9), (2, 9), (2, 5))]
