"""Statistics of a model in memory: what they are, who shares them, and that the pass leaves the model alone."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eckart.errors import EckartError
from eckart.stats import live_gradients, live_moments, live_statistics


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=31, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name}


BATCHES = [torch.arange(24).reshape(2, 12) % 31, (torch.arange(18).reshape(2, 9) * 7) % 31]


def inputs_of(model: nn.Module, layer: nn.Module, batches: list) -> torch.Tensor:
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)
    handle.remove()
    return torch.cat(seen).double()


def test_moments_are_those_of_the_inputs_and_shared_by_who_sees_one_tensor():
    model, found = llama(), {}
    found = live_moments(model, layers(model), BATCHES)
    assert model.training
    for name, layer in layers(model).items():
        x = inputs_of(model, layer, BATCHES)
        assert found[name].count == len(x)
        assert torch.allclose(found[name].second.double(), x.mT @ x / len(x), atol=1e-6)
        assert torch.allclose(found[name].mean.double(), x.mean(0), atol=1e-6)
    attention = "model.layers.0.self_attn."
    assert found[f"{attention}q_proj"] is found[f"{attention}v_proj"]
    assert found[f"{attention}q_proj"] is not found[f"{attention}o_proj"]


def test_the_head_is_spared_all_tokens_but_the_last():
    model = llama()
    body = layers(model)
    tokens: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    found = live_moments(model, body, [{"input_ids": ids, "labels": ids} for ids in BATCHES])
    assert tokens == [1, 1]
    whole = live_moments(model, {**body, "lm_head": model.lm_head}, BATCHES)
    assert tokens[2:] == [ids.shape[1] for ids in BATCHES]
    assert whole["lm_head"].count == found["model.layers.0.self_attn.q_proj"].count
    assert all(torch.equal(found[name].second, whole[name].second) for name in body)


def test_padding_counts_for_nothing():
    model = llama().eval()
    short, long = BATCHES[1][:1], BATCHES[0][:1]
    padded = torch.zeros(2, 12, dtype=torch.int64)
    padded[0], padded[1, :9] = long[0], short[0]
    mask = torch.ones_like(padded)
    mask[1, 9:] = 0
    together = live_moments(model, layers(model), [{"input_ids": padded, "attention_mask": mask}])
    apart = live_moments(model, layers(model), [long, short])
    for name in together:
        assert together[name].count == apart[name].count == 21
        assert torch.allclose(together[name].second, apart[name].second, atol=1e-5)


def test_gradients_are_autograd_s_and_no_parameter_gets_one():
    model = llama()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    found = live_gradients(model, layers(model), BATCHES)
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True).eval()
    for batch in BATCHES:
        model(batch, labels=batch).loss.backward()
    for name, layer in layers(model).items():
        alike = torch.cosine_similarity(found[name].flatten(), layer.weight.grad.flatten(), dim=0)
        assert alike == pytest.approx(1.0, abs=1e-5)


def test_one_pass_gives_what_two_do():
    model = llama()
    found = live_statistics(model, layers(model), BATCHES)
    moments, gradients = live_moments(model, layers(model), BATCHES), live_gradients(model, layers(model), BATCHES)
    for name in layers(model):
        assert torch.equal(found.moments[name].second, moments[name].second)
        assert torch.equal(found.gradients[name], gradients[name])
        assert not found.moments[name].second.requires_grad
    attention = "model.layers.0.self_attn."
    assert found.moments[f"{attention}q_proj"] is found.moments[f"{attention}k_proj"]


def test_what_no_batch_reaches_is_named():
    model = llama()
    with pytest.raises(EckartError, match="never reached"):
        live_moments(model, layers(model), [])
    with pytest.raises(EckartError, match="returned no loss"):
        live_gradients(model.model, layers(model.model), [{"input_ids": BATCHES[0], "labels": None}])
