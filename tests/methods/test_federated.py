"""Adapters that many clients train: the server's step against dense products, rounds against plain code, privacy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

import eckart
from eckart.errors import EckartError
from eckart.maps import LowRank
from eckart.methods.adapt.federated import example_losses


class Network(nn.Module):
    """Two layers and a head, called as models of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(20, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(inputs).relu()).relu())
        return out


def losses(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")


def network(method: str = "fedsvd", **options) -> nn.Module:
    options = {"trained": (), **options}
    return eckart.adapt(Network(), method, targets=["first", "second"], rank=3, alpha=3.0, **options)


def data(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 20, generator=generator)
    return {"inputs": inputs, "labels": inputs[:, :3].argmax(1)}


CLIENTS = [data(40, 1), data(20, 2), data(60, 3)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def pair(seed: int, rank: int = 3) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(8, rank, generator=generator), torch.randn(rank, 6, generator=generator))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), weights=st.lists(st.floats(0.1, 9.0), min_size=1, max_size=4), shared=st.booleans())
def test_the_server_s_change_is_the_clients_weighted_mean(seed: int, weights: list[float], shared: bool):
    own = [pair(seed + i) for i in range(len(weights))]
    if shared:
        own = [LowRank(one.up, own[0].down) for one in own]
    made = eckart.recombine([{"layer": one} for one in own], weights)["layer"]
    mean = sum(w * one.dense().double() for w, one in zip(weights, own, strict=True)) / sum(weights)
    u, s, vh = torch.linalg.svd(mean)
    best = (u[:, :3] * s[:3]) @ vh[:3]  # all of the mean where the clients share their first factor
    assert torch.allclose(made.dense().double(), best, atol=1e-5)
    assert torch.allclose(made.down @ made.down.mT, torch.eye(3), atol=1e-5)
    gram = made.up.mT @ made.up
    assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-4)
    if shared:
        assert torch.allclose(made.dense().double(), mean, atol=1e-5)


def test_clients_that_do_not_fit_each_other_are_refused():
    for clients, weights in (([], None), ([{"a": pair(0)}, {"b": pair(1)}], None), ([{"a": pair(0)}], [0.0])):
        with pytest.raises(EckartError, match=r"recombine needs|weights must be"):
            eckart.recombine(clients, weights)
    with pytest.raises(EckartError, match="at one client"):
        eckart.recombine([{"a": pair(0)}, {"a": LowRank(torch.ones(5, 3), torch.ones(3, 6))}])


def test_factors_go_out_and_come_back():
    model, other = network(), network(seed=5)
    handle, target = eckart.adapters(model), eckart.adapters(other)
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.adapter("default").trained()[0].normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 20)
    sent = handle.factors()
    target.put_factors(sent)
    assert torch.equal(model(x), other(x))
    target.put_factors(eckart.recombine([sent]))
    assert torch.allclose(model(x), other(x), atol=1e-5)
    before = state(other)
    with pytest.raises(EckartError, match="factors of second are None"):
        target.put_factors({"first": sent["first"]})
    assert same(before, other.state_dict())
    with pytest.raises(EckartError, match="not one low-rank change"):
        eckart.adapters(network("dora")).factors()


@pytest.mark.parametrize("method", ["fedsvd", "ffa-lora", "lora"])
def test_a_round_is_local_sgd_and_a_weighted_mean(method: str):
    model, clients = network(method), [data(8, 1), data(8, 2), data(8, 3)]
    clients[2] = {key: value[:4] for key, value in clients[2].items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    start, total = state(model), dict.fromkeys(trained, 0.0)
    for one in clients:  # batches of everybody: no order to know
        own = network(method)
        parameters = {n: p for n, p in own.named_parameters() if n in trained}
        for _ in range(3):
            gradients = torch.autograd.grad(losses(own, one).mean(), list(parameters.values()))
            with torch.no_grad():
                for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                    parameter -= 0.2 * gradient
        for name, parameter in parameters.items():
            total[name] = total[name] + len(one["labels"]) / 20 * parameter.detach()
    done = eckart.federate(model, clients, rounds=1, steps=3, batch=8, rate=0.2, losses=losses)
    assert done.steps == (3, 3, 3)
    assert done.epsilons == (float("inf"),) * 3
    assert done.sent == sum(start[name].numel() for name in trained)
    expected = network(method)
    expected.load_state_dict(start | total)
    x = torch.randn(6, 20)
    assert torch.allclose(model(x), expected(x), atol=1e-5)
    for layer, factors in eckart.adapters(model).factors().items():
        orthonormal = torch.allclose(factors.down @ factors.down.mT, torch.eye(3), atol=1e-5)
        assert orthonormal == (method == "fedsvd")
        moved = not torch.equal(factors.down, eckart.adapters(network(method)).factors()[layer].down)
        assert moved == (method != "ffa-lora")


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_clients_learn_together_and_the_same_seed_gives_the_same_bits(noise: float):
    runs = []
    for seed in (0, 0, 1):
        model, seen = network(trained=["head"]), []
        everything = {key: torch.cat([one[key] for one in CLIENTS]) for key in CLIENTS[0]}
        before = float(losses(model, everything).mean().detach())
        done = eckart.federate(
            model, CLIENTS, rounds=12, steps=4, batch=20, rate=0.5, chosen=0.7, noise=noise, seed=seed, losses=losses,
            after=lambda index, model=model, seen=seen: seen.append(index + model.eval().training),
        )  # fmt: skip
        runs.append(state(model))
        assert seen == list(range(12))
        assert model.training  # as it was
        assert sum(done.steps) == 12 * 2 * 4
        assert float(losses(model, everything).mean().detach()) < before - (0.02 if noise else 0.15)
        assert all(0 < spent < float("inf") for spent in done.epsilons) == bool(noise)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_noise_has_the_deviation_that_privacy_asks_for():
    """Without a loss that depends on the data a step is noise alone: rate x noise x clip / batch."""
    model = network("ffa-lora")
    before = state(model)

    def nothing(model: nn.Module, batch) -> Tensor:
        return 0 * losses(model, batch)

    eckart.federate(model, [data(50, 1)], rounds=1, steps=4, batch=5, rate=0.5, noise=3.0, clip=1.5, losses=nothing)
    moved = torch.cat([(v - before[n]).flatten() for n, v in model.state_dict().items() if "up.weight" in n])
    assert moved.numel() == 144
    assert float(moved.std()) == pytest.approx(2 * 0.5 * 3.0 * 1.5 / 5, rel=0.2)  # root of 4 steps


def test_one_client_cannot_move_a_private_step_further_than_the_clip():
    moved = []
    for factor in (1.0, 1e4):
        model = network("ffa-lora")
        start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

        def larger(model: nn.Module, batch, factor: float = factor) -> Tensor:
            return factor * losses(model, batch)

        eckart.federate(model, [data(1, 1)], rounds=1, steps=1, batch=1, rate=1.0, noise=1e-6, clip=0.01, losses=larger)
        end = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        moved.append(float((end - start).norm()))
    assert moved == pytest.approx([0.01, 0.01], rel=1e-3)


REFUSED = [
    ({"rounds": 0}, "must be positive"),
    ({"rate": 0.0}, "must be positive"),
    ({"noise": -1.0}, "must be positive"),
    ({"clients": []}, "one client or more"),
    ({"clients": [{"inputs": torch.zeros(3, 20)}]}, "needs labels"),
    ({"clients": [torch.zeros(3, 20)]}, "needs labels"),
    ({"rate": 1e30, "steps": 5}, "no longer finite"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_bad_input_is_refused_and_leaves_the_model(changed: dict, words: str):
    model = network()
    before = state(model)
    arguments = {"clients": CLIENTS, "rounds": 1, "losses": losses, **changed}
    with pytest.raises(EckartError, match=words):
        eckart.federate(model, arguments.pop("clients"), **arguments)
    assert same(before, model.state_dict())


def test_labels_choose_the_loss_of_models_of_transformers():
    logits = torch.randn(2, 4, 5)

    def model(**_) -> ModelOutput:
        return ModelOutput(logits=logits)

    labels = torch.tensor([[0, 1, 2, 3], [4, 0, -100, -100]])
    expected = [F.cross_entropy(logits[0, :3], labels[0, 1:]), F.cross_entropy(logits[1, :1], labels[1, 1:2])]
    assert torch.allclose(example_losses(model, {"labels": labels}), torch.stack(expected))


def test_what_does_not_train_is_refused():
    model = network()
    eckart.adapt(model, "lora", name="other", rank=3, targets=["first"], trained=())
    handle = eckart.adapters(model)
    handle.use(*handle.combine("default", "other", how="sum"))
    with pytest.raises(EckartError, match="nothing of the adapter 'combined' trains"):
        eckart.federate(model, CLIENTS, rounds=1, losses=losses)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("switchlora", {"rank": 3}), ("lift", {"rank": 3, "budget": 2}), ("sara", {"threshold": 0.05})],
)
def test_what_moves_between_steps_is_refused(method: str, settings: dict):
    model = eckart.adapt(Network(), method, targets=["first", "second"], trained=(), **settings)
    before = state(model)
    with pytest.raises(EckartError, match=f"{method} with these settings changes between steps what it trains"):
        eckart.federate(model, CLIENTS, rounds=1, losses=losses)
    assert same(before, model.state_dict())


@pytest.mark.parametrize(
    ("method", "settings"),
    [("lift", {"rank": 3, "budget": 2, "refresh": 0}), ("sara", {"threshold": 0.05, "progressive": 0.0})],
)
def test_what_stays_trains_at_clients(method: str, settings: dict):
    model = eckart.adapt(Network(), method, targets=["first", "second"], trained=(), **settings)
    before = state(model)
    eckart.federate(model, CLIENTS, rounds=1, losses=losses)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 2
