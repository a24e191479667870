"""The objectives: gradients with labels from the model are the Fisher matrix, and predict what a change costs."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.stats import (
    Store,
    collect_gradients,
    collect_inputs,
    gradients_of,
    inputs_of,
    objective,
    sentence_embedding,
)

IDS = torch.tensor([[3, 7, 1, 9]])


def output_of(logits: torch.Tensor) -> types.SimpleNamespace:
    return types.SimpleNamespace(logits=logits)


def test_sampled_gradients_have_the_fisher_matrix_as_second_moment():
    torch.manual_seed(0)
    one = torch.randn(7)
    logits = one.expand(50, 1000, 7).clone().requires_grad_(True)
    goal = objective("sampled", has_logits=True, causal=True)
    value = goal.scalar(output_of(logits), torch.zeros(50, 1000, dtype=torch.int64), torch.Generator().manual_seed(1))
    rows = torch.autograd.grad(value, logits)[0].reshape(-1, 7)
    p = one.softmax(0)
    # the largest standard error of an entry is below 0.25 / sqrt(50000) = 0.0011
    torch.testing.assert_close(rows.mT @ rows / 50000, p.diag() - p.outer(p), atol=0.005, rtol=0)


def test_sampled_labels_stay_in_range_for_extreme_logits():
    logits = torch.full((1, 3, 5), -1e4)
    logits[..., 4] = 1e4
    goal = objective("sampled", has_logits=True, causal=True)
    assert float(goal.scalar(output_of(logits), torch.zeros(1, 3), torch.Generator())) == 0.0


def test_observed_labels_are_the_next_tokens():
    logits = torch.randn(2, 4, 6)
    ids = torch.randint(0, 6, (2, 4))
    expected = sum(F.cross_entropy(logits[b, t], ids[b, t + 1]) for b in range(2) for t in range(3))
    goal = objective("observed", has_logits=True, causal=True)
    torch.testing.assert_close(goal.scalar(output_of(logits), ids, torch.Generator()), expected)


def layer_output_jacobian(model: nn.Module, layer: nn.Module, finish) -> torch.Tensor:
    """d finish(model output) / d (layer output), (result..., t, m), by a shift added to the layer's output."""
    with torch.no_grad():
        shape = []
        handle = layer.register_forward_hook(lambda m, a, out: shape.append(out.shape))
        model(IDS)
        handle.remove()

    def shifted(delta: torch.Tensor) -> torch.Tensor:
        added = layer.register_forward_hook(lambda m, a, out: out + delta)
        try:
            return finish(model(IDS))
        finally:
            added.remove()

    return torch.autograd.functional.jacobian(shifted, torch.zeros(shape[0][1:]))


@pytest.mark.parametrize("inner", ["self_attn.v_proj", "mlp.down_proj"])
@pytest.mark.parametrize("index", [0, 1])
def test_the_output_moment_of_a_layer_is_its_fisher_matrix(index, inner, tiny, streamed, tmp_path):
    model = tiny("smallest")
    runner, name = streamed(model), f"model.layers.{index}.{inner}"
    goal = objective("sampled", has_logits=True, causal=True)
    collect_gradients_of(runner, goal, [IDS.expand(2500, 4).contiguous()], tmp_path)
    got = gradients_of(Store(tmp_path / "s"), goal, index)[name].second
    jacobian = layer_output_jacobian(model, model.get_submodule(name), lambda out: out.logits[0])  # (t, V, s, m)
    p = model(IDS).logits[0].softmax(-1).detach()
    fisher = p.diag_embed() - p.unsqueeze(1) * p.unsqueeze(2)  # (t, V, V)
    expected = torch.einsum("tvsm,tvw,twsn->mn", jacobian, fisher, jacobian).double() / 4
    assert (got - expected).norm() < 0.1 * expected.norm()
    assert abs(got.trace() / expected.trace() - 1) < 0.05


def collect_gradients_of(runner, goal, samples, folder) -> None:
    store, boundaries = Store(folder / "s"), Store(folder / "b")
    collect_inputs(runner, samples, store, boundaries=boundaries)
    collect_gradients(runner, samples, goal, store, boundaries)


def test_the_output_moment_of_an_encoder_is_how_far_its_embedding_moves(tiny, streamed, tmp_path):
    model = tiny("smallest-encoder")
    runner, name = streamed(model), "encoder.layer.0.output.dense"
    goal = objective("sampled", has_logits=False, causal=False)
    collect_gradients_of(runner, goal, [IDS.expand(2500, 4).contiguous()], tmp_path)
    got = gradients_of(Store(tmp_path / "s"), goal, 0)[name].second
    jacobian = layer_output_jacobian(model, model.get_submodule(name), lambda out: sentence_embedding(out)[0])
    expected = torch.einsum("dsm,dsn->mn", jacobian, jacobian).double() / 4
    assert (got - expected).norm() < 0.1 * expected.norm()


def perturbed(model: nn.Module, name: str, delta: torch.Tensor, ids: torch.Tensor):
    layer = model.get_submodule(name)
    layer.weight.data += delta
    try:
        return model(ids)
    finally:
        layer.weight.data -= delta


@torch.no_grad()
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"])
def test_the_predicted_loss_of_a_small_change_is_the_measured_divergence(name, tiny, streamed, tmp_path):
    model = tiny("smallest").double()
    ids = torch.randint(0, 11, (600, 8), generator=torch.Generator().manual_seed(2))
    runner = streamed(tiny("smallest"))
    goal = objective("sampled", has_logits=True, causal=True)
    collect_gradients_of(runner, goal, [ids], tmp_path)
    store = Store(tmp_path / "s")
    g, b = inputs_of(store, 1)[name].second, gradients_of(store, goal, 1)[name].second
    delta = 1e-3 * torch.randn(b.shape[0], g.shape[0], generator=torch.Generator().manual_seed(3)).double()
    predicted = goal.scale(ids.numel(), ids.shape[0]) * (b @ delta @ g @ delta.mT).trace()
    before, after = model(ids).logits.log_softmax(-1), perturbed(model, name, delta, ids).logits.log_softmax(-1)
    measured = (before.exp() * (before - after)).sum(-1).mean()
    # the Kronecker form takes inputs and gradients for independent, which they are not quite
    assert 0.7 < predicted / measured < 1.4, float(predicted / measured)


@torch.no_grad()
def test_the_predicted_distance_of_an_encoder_has_the_right_scale(tiny, streamed, tmp_path):
    model, name = tiny("smallest-encoder").double(), "encoder.layer.1.output.dense"
    ids = torch.randint(0, 11, (600, 8), generator=torch.Generator().manual_seed(2))
    goal = objective("sampled", has_logits=False, causal=False)
    collect_gradients_of(streamed(tiny("smallest-encoder")), goal, [ids], tmp_path)
    store = Store(tmp_path / "s")
    g, b = inputs_of(store, 1)[name].second, gradients_of(store, goal, 1)[name].second
    delta = 1e-3 * torch.randn(b.shape[0], g.shape[0], generator=torch.Generator().manual_seed(3)).double()
    predicted = goal.scale(ids.numel(), ids.shape[0]) * (b @ delta @ g @ delta.mT).trace()
    before, after = sentence_embedding(model(ids)), sentence_embedding(perturbed(model, name, delta, ids))
    measured = (before - after).square().sum(-1).mean()
    # every token's change moves the mean; the prediction counts their squares and not their products
    assert 1 / 8 < predicted / measured < 1.25, float(predicted / measured)


def test_embeddings_are_means_of_unit_length():
    states = torch.randn(3, 5, 4)
    got = sentence_embedding(types.SimpleNamespace(last_hidden_state=states))
    assert torch.allclose(got.norm(dim=-1), torch.ones(3))
    assert torch.allclose(got, states.mean(1) / states.mean(1).norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("labels", "has_logits", "causal", "name"),
    [
        ("sampled", True, True, "sampled-labels"),
        ("observed", True, True, "observed-labels"),
        ("sampled", True, False, "sampled-labels"),
        ("observed", False, False, "sentence-embedding"),
    ],
)
def test_the_objective_follows_from_the_model(labels, has_logits, causal, name):
    assert objective(labels, has_logits, causal).name == name


def test_objectives_that_cannot_be_are_refused():
    with pytest.raises(EckartError, match="'sampled' or 'observed', got 'own'"):
        objective("own", has_logits=True, causal=True)
    with pytest.raises(EckartError, match="predicts the next token; use labels=sampled"):
        objective("observed", has_logits=True, causal=False)
