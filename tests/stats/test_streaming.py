"""Statistics collected block by block are those of the whole model, and a run that was stopped goes on."""

import pytest
import torch
from torch import nn

from eckart.errors import EckartError
from eckart.hosts import linear_layers
from eckart.stats import (
    Moments,
    Store,
    collect_gradients,
    collect_inputs,
    enter,
    gradients_of,
    head_inputs,
    input_groups,
    inputs_of,
    load_hidden,
    objective,
    streaming,
    token_counts,
    weight_gradients_of,
)

MODELS = ["llama", "gpt2", "bert", "bert-mlm"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def layers_by_block(model: nn.Module, runner) -> list[dict[str, nn.Module]]:
    return [linear_layers(model.get_submodule(name), name) for name in runner.parts.blocks]


def seen_by(model: nn.Module, layers: dict[str, nn.Module], samples) -> dict[str, torch.Tensor]:
    """Inputs of layers in the whole model, (vectors, n) float64."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0].detach().double()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for ids in samples:
            model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]) for name, xs in seen.items()}


def goal_of(runner, labels: str):
    head = runner.parts.head is not None
    return objective(labels, head, causal=head and "ForMasked" not in type(runner.model).__name__)


@pytest.mark.parametrize("name", MODELS)
def test_input_moments_are_those_of_the_whole_model(name, tiny, streamed, samples, tmp_path):
    model, store = tiny(name), Store(tmp_path)
    runner = streamed(model)
    collect_inputs(runner, samples, store)
    for index, layers in enumerate(layers_by_block(model, runner)):
        known, seen = inputs_of(store, index), seen_by(model, layers, samples)
        assert known.keys() == layers.keys()
        for layer, rows in seen.items():
            assert known[layer].count == 55  # every token once
            torch.testing.assert_close(known[layer].mean, rows.mean(0), **CLOSE)
            torch.testing.assert_close(known[layer].mean_abs, rows.abs().mean(0), **CLOSE)
            torch.testing.assert_close(known[layer].second, rows.mT @ rows / 55, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_influence_is_how_far_a_block_turns_its_input(name, tiny, streamed, samples, tmp_path):
    model, store = tiny(name), Store(tmp_path)
    collect_inputs(streamed(model), samples, store)
    with torch.no_grad():
        states = [model(ids, output_hidden_states=True).hidden_states for ids in samples]
    for index in range(2):  # what transformers gives last is behind the final norm
        cosines = [torch.cosine_similarity(h[index], h[index + 1], dim=-1).flatten() for h in states]
        expected = 1 - torch.cat(cosines).double().mean()
        torch.testing.assert_close(store.load("influence", index)["block"]["influence"], expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm"])
def test_head_moments_are_those_of_the_whole_model(name, tiny, streamed, samples, tmp_path):
    model, store = tiny(name), Store(tmp_path)
    runner = streamed(model)
    collect_inputs(runner, samples, store)
    rows = seen_by(model, {"head": model.get_output_embeddings()}, samples)["head"]
    known = Moments.of(store.load("head-inputs", 0)["head"])
    torch.testing.assert_close(known.second, rows.mT @ rows / 55, **CLOSE)
    torch.testing.assert_close(known.mean, rows.mean(0), **CLOSE)


def test_a_model_without_head_has_no_head_moments(tiny, streamed, samples, tmp_path):
    collect_inputs(streamed(tiny("bert")), samples, Store(tmp_path))
    assert not Store(tmp_path).has("head-inputs", 1)


def test_layers_called_with_one_tensor_share_one_object(tiny, streamed, samples, tmp_path):
    runner = streamed(tiny("llama"))
    collect_inputs(runner, samples, Store(tmp_path))
    known = {name.removeprefix("model.layers.1."): m for name, m in inputs_of(Store(tmp_path), 1).items()}
    assert known["self_attn.q_proj"] is known["self_attn.k_proj"] is known["self_attn.v_proj"]
    assert known["mlp.gate_proj"] is known["mlp.up_proj"]
    assert len({id(moments) for moments in known.values()}) == 4


def test_groups_are_in_execution_order(tiny, streamed, samples):
    runner = streamed(tiny("llama"))
    stream = enter(runner, samples)
    with runner.resident("model.layers.0") as block:
        groups = input_groups(runner, block, "model.layers.0", 0, stream)
    short = [[name.rpartition(".")[2] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_calls_of_equal_batches_are_held_once(tiny, streamed, samples):
    stream = enter(streamed(tiny("llama")), [samples[0], samples[0] + 1, samples[2]])
    assert stream.calls[0] is stream.calls[1]
    assert stream.calls[2] is not stream.calls[0]


@pytest.mark.parametrize("name", MODELS)
def test_boundaries_are_the_hidden_states_of_the_whole_model(name, tiny, streamed, samples, tmp_path):
    model = tiny(name)
    runner = streamed(model)
    collect_inputs(runner, samples, Store(tmp_path / "a"), boundaries=Store(tmp_path / "b"))
    with torch.no_grad():
        expected = [model(ids, output_hidden_states=True).hidden_states for ids in samples]
    for index in range(len(runner.parts.blocks)):  # what transformers gives last is behind the final norm
        for got, all_of_it in zip(load_hidden(Store(tmp_path / "b"), index, runner.device), expected, strict=True):
            torch.testing.assert_close(got, all_of_it[index], atol=1e-5, rtol=0)
    assert Store(tmp_path / "b").has("boundary", len(runner.parts.blocks) + 1)


class Reference:
    """Output gradients of all layers, and squared weight gradients per row, by autograd on the whole model."""

    def __init__(self, model: nn.Module, watched: dict[str, nn.Module], goal, samples, seed: int) -> None:
        self.gradients: dict[str, list[torch.Tensor]] = {name: [] for name in watched}
        self.fisher = {name: torch.zeros(()) for name in watched}
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for i, ids in enumerate(samples):
            self._batch(model, watched, goal, ids, seed + 7919 * i)
        self.sequences = sum(ids.shape[0] for ids in samples)

    def _batch(self, model, watched, goal, ids, seed) -> None:
        outputs: dict[str, torch.Tensor] = {}

        def keep(name):
            return lambda module, args, out: outputs.__setitem__(name, out)

        handles = [layer.register_forward_hook(keep(name)) for name, layer in watched.items()]
        value = goal.scalar(model(ids), ids, torch.Generator().manual_seed(seed))
        found = torch.autograd.grad(value, list(outputs.values()))
        for name, gradient in zip(outputs, found, strict=True):
            self.gradients[name].append(gradient.double().reshape(-1, gradient.shape[-1]))
        for handle in handles:
            handle.remove()

    def second(self, name: str) -> torch.Tensor:
        rows = torch.cat(self.gradients[name])
        return rows.mT @ rows / rows.shape[0]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("llama", "observed"),
        ("llama", "sampled"),
        ("gpt2", "observed"),
        ("gpt2", "sampled"),
        ("bert", "sampled"),
        ("bert-mlm", "sampled"),
    ],
)
def test_gradient_moments_are_those_of_the_whole_model(name, labels, tiny, streamed, samples, tmp_path):
    model, store, boundaries = tiny(name), Store(tmp_path / "s"), Store(tmp_path / "b")
    runner = streamed(model)
    goal = goal_of(runner, labels)
    collect_inputs(runner, samples, store, boundaries=boundaries)
    collect_gradients(runner, samples, goal, store, boundaries, seed=3)
    blocks = layers_by_block(model, runner)
    reference = Reference(model, {k: v for block in blocks for k, v in block.items()}, goal, samples, seed=3)
    for index, layers in enumerate(blocks):
        known = gradients_of(store, goal, index)
        assert known.keys() == layers.keys()
        for layer in layers:
            expected = reference.second(layer)
            assert known[layer].count == 55
            error = (known[layer].second - expected).norm() / expected.norm()
            assert error < 1e-5, (layer, float(error))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_row_fisher_is_the_squared_gradient_of_every_row(name, tiny, streamed, samples, tmp_path):
    model, store, boundaries = tiny(name), Store(tmp_path / "s"), Store(tmp_path / "b")
    runner = streamed(model)
    goal = goal_of(runner, "observed")
    collect_inputs(runner, samples, store, boundaries=boundaries)
    collect_gradients(runner, samples, goal, store, boundaries)
    for index, layers in enumerate(layers_by_block(model, runner)):
        known = gradients_of(store, goal, index)
        for layer, module in layers.items():
            sums = torch.zeros_like(known[layer].row_fisher)
            sequences = [one for ids in samples for one in ids.split(1)]
            for ids in sequences:
                value = goal.scalar(model(ids), ids, torch.Generator())
                (gradient,) = torch.autograd.grad(value, module.weight)
                rows = gradient if isinstance(module, nn.Linear) else gradient.mT  # Conv1D holds (in, out)
                sums += rows.double().square().sum(1)
            torch.testing.assert_close(known[layer].row_fisher, sums / len(sequences), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weight_gradients_are_those_of_the_whole_model(name, tiny, streamed, samples, tmp_path):
    model, store, boundaries = tiny(name), Store(tmp_path / "s"), Store(tmp_path / "b")
    runner = streamed(model)
    goal = goal_of(runner, "observed")
    collect_inputs(runner, samples, store, boundaries=boundaries)
    collect_gradients(runner, samples, goal, store, boundaries)
    assert not store.has(f"weight-gradients-{goal.name}", 1)  # only if asked for
    collect_gradients(runner, samples, goal, store, boundaries, weights=True)
    sum(goal.scalar(model(ids), ids, torch.Generator()) for ids in samples).backward()
    for index, layers in enumerate(layers_by_block(model, runner)):
        known = weight_gradients_of(store, goal, index)
        assert known.keys() == layers.keys()
        for layer, module in layers.items():
            expected = module.weight.grad if isinstance(module, nn.Linear) else module.weight.grad.mT
            torch.testing.assert_close(known[layer] * 55, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "bert"])
def test_the_ends_are_those_of_the_whole_model(name, tiny, streamed, samples, tmp_path):
    model, store, boundaries = tiny(name), Store(tmp_path / "s"), Store(tmp_path / "b")
    runner = streamed(model)
    goal = goal_of(runner, "sampled")
    collect_inputs(runner, samples, store, boundaries=boundaries)
    collect_gradients(runner, samples, goal, store, boundaries, seed=1)
    ends = store.load(f"ends-{goal.name}", 0)
    reference = Reference(model, {"embedding": model.get_input_embeddings()}, goal, samples, seed=1)
    expected = reference.second("embedding")
    assert (ends["embedding"]["second"] - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(ends["embedding"]["counts"], token_counts(samples, 60))
    if name == "bert":
        assert "head" not in ends
        return
    rows = seen_by(model, {"head": model.get_output_embeddings()}, samples)["head"]
    torch.testing.assert_close(ends["head"]["second"], rows.mT @ rows / 55, **CLOSE)
    with torch.no_grad():
        likely = torch.cat([model(ids).logits.double().softmax(-1).flatten(0, 1) for ids in samples])
    torch.testing.assert_close(ends["head"]["probability"], likely.mean(0), **CLOSE)


def test_logits_in_pieces_change_nothing(tiny, streamed, samples, tmp_path, monkeypatch):
    runner = streamed(tiny("llama"))
    goal = goal_of(runner, "observed")  # sampled labels are drawn per piece
    for name in ("whole", "pieces"):
        store, boundaries = Store(tmp_path / name), Store(tmp_path / f"{name}-b")
        collect_inputs(runner, samples, store, boundaries=boundaries)
        collect_gradients(runner, samples, goal, store, boundaries)
        monkeypatch.setattr(streaming._Ends, "LOGITS", 60 * 9 * 2)
    for index in range(3):
        whole, pieces = (gradients_of(Store(tmp_path / name), goal, index) for name in ("whole", "pieces"))
        for layer in whole:
            torch.testing.assert_close(whole[layer].second, pieces[layer].second, rtol=1e-4, atol=1e-9)


def test_sampled_labels_in_pieces_are_drawn_independently(tiny, streamed, tmp_path, monkeypatch):
    runner, ids = streamed(tiny("llama")), torch.full((4, 9), 7)
    drawn = []
    monkeypatch.setattr(streaming._Ends, "LOGITS", 60 * 9)
    monkeypatch.setattr(torch, "rand", lambda *a, rand=torch.rand, **k: drawn.append(rand(*a, **k)) or drawn[-1])
    collect_inputs(runner, [ids, ids], Store(tmp_path / "s"), boundaries=Store(tmp_path / "b"))
    collect_gradients(runner, [ids, ids], goal_of(runner, "sampled"), Store(tmp_path / "s"), Store(tmp_path / "b"))
    assert len(drawn) == 8
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 8


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stopped_pass_goes_on_and_ends_in_the_same_files(stop, tiny, streamed, samples, tmp_path, monkeypatch):
    runner = streamed(tiny("llama"))
    collect_inputs(runner, samples, Store(tmp_path / "a"), boundaries=Store(tmp_path / "ab"))

    def progress(stage: str, done: int, total: int) -> None:
        if done == stop:
            raise Stopped

    with pytest.raises(Stopped):
        collect_inputs(runner, samples, Store(tmp_path / "b"), boundaries=Store(tmp_path / "bb"), progress=progress)
    run = []
    monkeypatch.setattr(
        streaming, "advance", lambda *args, advance=streaming.advance: run.append(args[2]) or advance(*args)
    )
    collect_inputs(runner, samples, Store(tmp_path / "b"), boundaries=Store(tmp_path / "bb"))
    assert run == list(range(stop, 3))
    for one, other in (("a", "b"), ("ab", "bb")):
        names = sorted(path.name for path in (tmp_path / one).iterdir())
        assert names == sorted(path.name for path in (tmp_path / other).iterdir())
        for name in names:
            assert (tmp_path / one / name).read_bytes() == (tmp_path / other / name).read_bytes(), name


def test_statistics_without_their_hidden_states_are_collected_again(tiny, streamed, samples, tmp_path):
    runner, store = streamed(tiny("llama")), Store(tmp_path / "s")
    collect_inputs(runner, samples, store)
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    collect_inputs(runner, samples, store, boundaries=Store(tmp_path / "b"))
    assert Store(tmp_path / "b").has("boundary", 4)
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before


def test_a_layer_that_overflows_is_named(tiny, streamed, samples, tmp_path):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0] = 1e38
    with pytest.raises(EckartError, match=r"inputs of model.layers.1.mlp.down_proj hold NaN or Inf"):
        collect_inputs(streamed(model), samples, Store(tmp_path))
    assert Store(tmp_path).has("inputs", 1)
    assert not Store(tmp_path).has("inputs", 2)


def test_the_head_sees_what_it_sees_in_the_whole_model(tiny, streamed, samples, tmp_path):
    model = tiny("bert-mlm")  # a transformation lies between the blocks and the head
    runner = streamed(model)
    collect_inputs(runner, samples, Store(tmp_path / "s"), boundaries=Store(tmp_path / "b"))
    got = head_inputs(runner, runner.parts.head, load_hidden(Store(tmp_path / "b"), 3, runner.device))
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in got])
    expected = seen_by(model, {"head": model.get_output_embeddings()}, samples)["head"]
    torch.testing.assert_close(rows.double(), expected, **CLOSE)


def test_only_one_block_is_resident_on_the_way_back(tiny, streamed, samples, tmp_path):
    model = tiny("llama")
    runner = streamed(model)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    resident = []

    def progress(stage: str, done: int, total: int) -> None:
        resident.append(sum(p.numel() for p in runner.model.parameters() if p.device.type != "meta"))

    collect_inputs(runner, samples, Store(tmp_path / "s"), boundaries=Store(tmp_path / "b"), progress=progress)
    goal = goal_of(runner, "observed")
    collect_gradients(runner, samples, goal, Store(tmp_path / "s"), Store(tmp_path / "b"), progress=progress)
    ends = sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n)
    assert max(resident) <= max(block, ends)
