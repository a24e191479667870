"""SparseLoRA: which channels frozen layers compute in training, that the rest costs nothing, and when all are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import eckart
from eckart.errors import EckartError

IDS = torch.randint(0, 61, (3, 10), generator=torch.Generator().manual_seed(1))
# Predictors of full rank see what the layers see, so that a plain computation tells the choice.
EXACT = {
    "rank": 4,
    "predictor": 32,
    "dense": 0,
    "outputs": "sparse",
    "units_from": 0.0,
    "heads_from": 0.0,
    "until": 1.0,
}


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=32, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0)
    config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config).eval()


def adapted(model: nn.Module | None = None, **settings: Any) -> nn.Module:
    return eckart.adapt(model or llama(), "sparselora", **(EXACT | settings))


def disturb(model: nn.Module, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in eckart.adapters(model).layers.values():
            for parameter in layer.adapter(name).trained():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def loss(model: nn.Module, **options: Any) -> Tensor:
    return model(IDS, labels=options.pop("labels", IDS), **options).loss


def kept(lengths: Tensor, count: int) -> Tensor:
    """Return ones at the largest entries."""
    return torch.zeros_like(lengths).index_fill(0, lengths.topk(count).indices, 1.0)


def masked_mlp(mlp: nn.Module, x: Tensor, count: int) -> Tensor:
    """What an MLP gives if the base computes the units whose activations are longest, written out with masks."""
    gate, up, down = (getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down"))
    g, u = (F.linear(x, layer.base.weight) for layer in (gate, up))
    mask = kept((F.silu(g) * u).flatten(0, -2).norm(dim=0), count)
    hidden = F.silu(g * mask + added(gate, x)) * (u * mask + added(up, x))
    return F.linear(hidden * mask, down.base.weight) + added(down, hidden)


def added(layer: nn.Module, x: Tensor) -> Tensor:
    """What the adapter of a layer adds."""
    plus = layer.adapter("default").chain()[0]
    return plus.scale * F.linear(F.linear(x, plus.delta.down.weight), plus.delta.up.weight)


def test_an_mlp_computes_the_units_that_are_longest_in_the_batch():
    model = adapted(units=0.75).train()
    disturb(model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    for _ in range(2):  # another batch chooses anew
        x = torch.randn(2, 5, 32, requires_grad=True)
        got, wanted = mlp(x), masked_mlp(mlp, x, 12)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        parameters = [x, *(p for p in mlp.parameters() if p.requires_grad)]
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(wanted.square().sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_attention_computes_the_channels_of_the_longest_products_and_values():
    model = adapted(heads=0.5).train()
    attention = model.model.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        getattr(attention, f"{name}_proj").register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    inputs: list[Tensor] = []
    attention.q_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    attention.o_proj.register_forward_hook(lambda m, a, out: seen.update({"in": a[0], "o": out}))
    model(IDS)
    q, k, v = (F.linear(inputs[0], getattr(attention, f"{name}_proj").base.weight) for name in ("q", "k", "v"))
    lengths = {name: t.flatten(0, -2).norm(dim=0) for name, t in (("q", q), ("k", k), ("v", v))}
    # four heads of queries of eight channels, two of keys: heads 0 and 1 share the first key
    scores = kept(lengths["q"].view(2, 2, 8).mean(1).flatten() * lengths["k"], 8)
    values = kept(lengths["v"], 8)
    queries, outputs = (mask.view(2, 1, 8).expand(2, 2, 8).flatten() for mask in (scores, values))
    for name, plain, mask in (("q", q, queries), ("k", k, scores), ("v", v, values)):
        torch.testing.assert_close(seen[name], plain * mask, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        seen["o"], F.linear(seen["in"] * outputs, attention.o_proj.base.weight), atol=1e-5, rtol=1e-5
    )


def test_one_layer_of_queries_keys_and_values_and_an_mlp_with_biases_are_found():
    model = adapted(gpt2(), units=0.75, heads=0.5, targets=["c_attn", "c_fc", "c_proj"]).train()
    block = model.transformer.h[0]
    x = torch.randn(2, 5, 32)
    before = F.linear(x, block.attn.c_attn.base.weight.mT, block.attn.c_attn.base.bias)
    rows = block.attn.c_attn(x)
    zero = (rows - block.attn.c_attn.base.bias).abs().flatten(0, -2).sum(0) < 1e-6
    assert [int(part.sum()) for part in zero.split(32)] == [16, 16, 16]
    assert torch.equal(zero[:32], zero[32:64])
    torch.testing.assert_close(rows[..., ~zero], before[..., ~zero], atol=1e-5, rtol=1e-5)
    fc, proj = block.mlp.c_fc, block.mlp.c_proj
    hidden = block.mlp.act(F.linear(x, fc.base.weight.mT, fc.base.bias))
    mask = kept(hidden.flatten(0, -2).norm(dim=0), 32)
    part = block.mlp.act(F.linear(x, fc.base.weight.mT) * mask + fc.base.bias)
    wanted = F.linear(part * mask, proj.base.weight.mT, proj.base.bias)
    torch.testing.assert_close(block.mlp(x), wanted, atol=1e-5, rtol=1e-5)


def test_what_is_left_out_is_not_computed_forward_or_backward():
    counts = {}
    for name, settings in {"all": {"units": 0.0, "heads": 0.1}, "few": {"units": 0.9, "heads": 0.75}}.items():
        model = adapted(predictor=1, **settings).train()
        with FlopCounterMode(display=False) as counter:
            loss(model).backward()
        counts[name] = counter.get_total_flops()
    linear = 2 * IDS.numel() * 2 * sum(p.numel() for n, p in llama().named_parameters() if "proj" in n)
    assert counts["few"] < counts["all"] - 0.6 * linear


def test_evaluation_and_merging_compute_everything():
    model = adapted(units=0.75, heads=0.5)
    disturb(model)
    plain = eckart.adapt(llama(), "lora", rank=4)
    disturb(plain)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model.train()
    assert not torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-3)
    eckart.adapters(model).merge()
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=1e-4, rtol=1e-4)


def test_it_starts_dense_and_counts_passes_of_training_backward():
    model, plain = adapted(dense=2), eckart.adapt(llama(), "lora", rank=4)
    disturb(model)
    disturb(plain)
    model.train()
    wanted = loss(plain)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(loss(model), wanted)  # forward alone does not count
        found = loss(model)
        assert torch.equal(found, wanted)
        found.backward()
    assert not torch.allclose(loss(model), wanted, atol=1e-5)
    copied = copy.deepcopy(model)
    assert torch.equal(loss(copied), loss(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_choose_the_same_again(reentrant: bool):
    model = adapted(dense=1, units=0.75, heads=0.5).train()
    disturb(model)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other.enable_input_require_grads()
    for _ in range(3):  # the first is dense, and counts as one however often it is repeated
        gradients = []
        for each in (model, other):
            each.zero_grad()
            loss(each).backward()
            gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_tokens_that_the_loss_is_taken_at_compute_everything():
    model = adapted(units=0.75, heads=0.5, outputs="dense").train()
    disturb(model)
    plain = eckart.adapt(llama(), "lora", rank=4)
    disturb(plain)
    assert torch.equal(loss(model), loss(plain))  # every token is labelled
    labels = IDS.clone()
    labels[:, :6] = -100
    mlp = model.model.layers[0].mlp
    seen: list[tuple[Tensor, Tensor]] = []
    mlp.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    loss(model, labels=labels).backward()
    x, y = seen[-1]
    # the token before the first label predicts it
    torch.testing.assert_close(y[:, 5:], plain.model.layers[0].mlp(x)[:, 5:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[:, :5], masked_mlp(mlp, x, 12)[:, :5], atol=1e-5, rtol=1e-5)
    model(IDS)  # without labels nothing tells
    torch.testing.assert_close(seen[-1][1], masked_mlp(mlp, seen[-1][0], 12), atol=1e-5, rtol=1e-5)


def test_tokens_that_the_loss_is_taken_at_compute_everything_for_requests_as_well():
    """Sequences that ask for an adapter are a part of the batch, and so are their labels."""
    model = adapted(units=0.75, heads=0.5, outputs="dense").train()
    disturb(model)
    plain = eckart.adapt(llama(), "lora", rank=4)
    disturb(plain)
    wanted = ["default", None, "default"]
    with eckart.adapters(model).requests(wanted), eckart.adapters(plain).requests(wanted):
        assert torch.equal(loss(model), loss(plain))  # every token is labelled
        labels = IDS.clone()
        labels[1:] = -100  # none of the last sequence, all of the first
        mlp = model.model.layers[0].mlp
        seen: list[tuple[Tensor, Tensor]] = []
        mlp.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
        loss(model, labels=labels).backward()
        x, y = seen[-1]
        dense = plain.model.layers[0].mlp(x)
        torch.testing.assert_close(y[:2], dense[:2], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(y[2], dense[2], atol=1e-3)


def test_which_blocks_skip_follows_the_shares():
    model = adapted(llama(), units_from=0.5, heads_from=0.0, until=1.0)
    skipping = {
        n for n, layer in eckart.adapters(model).layers.items() if layer.adapter("default").shortcut is not None
    }
    attention = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"}
    assert skipping == attention | {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}


def test_only_where_all_layers_around_the_channels_are_adapted():
    model = adapted(targets=["gate_proj", "up_proj", "down_proj", "q_proj"])
    layers = eckart.adapters(model).layers
    assert all((layer.adapter("default").shortcut is None) == ("q_proj" in name) for name, layer in layers.items())


def test_a_second_adapter_chooses_for_itself_and_leaves_no_trace():
    model = llama()
    state, hooks = copy.deepcopy(model.state_dict()), len(model._forward_pre_hooks)
    adapted(model, outputs="dense")
    adapted(model, name="second", units=0.5, outputs="dense")
    handle = eckart.adapters(model)
    handle.use("default", "second")
    loss(model.train(), labels=IDS.clone().index_fill(1, torch.arange(6), -100)).backward()
    trained = [p for layer in handle.layers.values() for name in handle.names for p in layer.adapter(name).trained()]
    assert all(p.grad is not None for p in trained)
    with handle.requests(["second", None, "default"]):
        assert model(IDS).logits.isfinite().all()
    handle.drop("second")
    assert len(model._forward_pre_hooks) == hooks + 1
    handle.remove()
    assert len(model._forward_pre_hooks) == hooks
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_saved_and_loaded_it_skips_the_same(tmp_path: Path):
    model = adapted(units=0.75, heads=0.5)
    disturb(model)
    eckart.adapters(model).save(tmp_path / "adapter")
    loaded = eckart.load_adapter(llama(), tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(loss(loaded.train()), loss(model.train()))
    assert torch.equal(*(each(IDS).logits for each in (loaded, model)))


def test_half_and_double_precision_and_autocast_train():
    for dtype in (torch.bfloat16, torch.float64):
        model = adapted(llama().to(dtype)).train()
        loss(model).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model = adapted().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss(model).backward()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"units": 1.0}, "units must be at least 0 and below 1"),
        ({"until": 1.5}, "until must be from 0 to 1"),
        ({"dense": -1}, "dense must be at least 0"),
        ({"predictor": 0}, "rank must be at least 1"),
        ({"units": 0.0, "heads": 0.0}, "there are no channels to skip"),
        ({"targets": ["q_proj"]}, "there are no channels to skip"),
        ({"outputs": "some"}, "must be one of dense, sparse"),
    ],
)
def test_what_skips_nothing_is_refused(settings: dict[str, Any], words: str):
    model = llama()
    with pytest.raises(EckartError, match=words):
        adapted(model, **settings)
    assert not model._forward_pre_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_layers_of_two_modules_are_left_alone_but_attention_is_found():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61)
    layers = eckart.adapters(adapted(BertModel(config).eval())).layers
    skipping = {name for name, layer in layers.items() if layer.adapter("default").shortcut is not None}
    assert skipping == {name for name in layers if ".attention." in name}
