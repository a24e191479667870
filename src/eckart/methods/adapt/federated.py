"""Federated training of an adapter: clients that keep their data train it in turn, a server averages what they send.

    round:  every chosen client starts at the server's adapter and takes a few steps of SGD on its own examples
            the server averages what trains, weighted by examples, and does what the method asks for (FedSVD: an SVD)

With noise every client is differentially private towards whoever sees what it sends: its batches take each of its
examples with one probability, every example's gradient is clipped (optim/per_example.py), and noise is added.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"; Abadi et al.
2016, "Deep Learning with Differential Privacy".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.linalg import all_finite
from eckart.maps import LowRank
from eckart.methods.adapt.adapters import Adapters
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.fedsvd import decomposed
from eckart.methods.training import STRIDE, seeded
from eckart.optim import clipped_gradients, epsilon
from eckart.progress import Progress, silent

Batch = Mapping[str, Tensor]
# One loss per example, (batch,).
Losses = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Federated:
    """What federated training did.

    Attributes:
        steps: of every client.
        epsilons: of every client's differential privacy, infinite without noise.
        sent: numbers that a client sends in a round.
    """

    steps: tuple[int, ...]
    epsilons: tuple[float, ...]
    sent: int


@dataclass(frozen=True, slots=True)
class _Local:
    """How a client trains."""

    steps: int
    batch: int
    rate: float
    clip: float
    noise: float
    losses: Losses

    def share(self, data: Batch) -> float:
        """Return the probability with which a private batch takes an example."""
        return min(1.0, self.batch / _count(data))


def federate(
    model: nn.Module,
    clients: Sequence[Batch],
    *,
    rounds: int,
    steps: int = 10,
    batch: int = 64,
    rate: float = 0.5,
    chosen: float = 1.0,
    noise: float = 0.0,
    clip: float = 2.0,
    delta: float = 1e-5,
    seed: int = 0,
    losses: Losses | None = None,
    after: Callable[[int], None] | None = None,
    progress: Progress = silent,
) -> Federated:
    """Train the active adapter of a model on the data of many clients, simulated on one machine.

    Args:
        model: with one active adapter; the server's, before and after.
        clients: the examples of each, as the model is called with, "labels" among them; first axis the examples.
        rounds: how often clients train and the server averages.
        steps: of SGD that a client takes in a round.
        batch: examples per step, on average where there is noise.
        rate: learning rate of SGD.
        chosen: share of the clients that train in a round, at least one.
        noise: deviation in relation to `clip`, as `eckart.optim.noise_for` returns it; 0 neither clips nor protects.
        clip: largest norm of an example's gradient.
        delta: of differential privacy.
        seed: seed of everything random.
        losses: one loss per example, given model and batch; by default cross-entropy of its class or next tokens.
        after: called with the number of every round behind it, the server's adapter being on the model.
        progress: told of the stage "rounds".

    Raises:
        EckartError: for bad input, a method that cannot train so, or numbers that are no longer finite.
    """
    handle, name = Adapters(model), _active(model)
    _check(clients, rounds, steps, batch, rate, chosen, noise, clip)
    _check_method(handle.state.described[name], private=noise > 0)
    local = _Local(steps, batch, rate, clip, noise, losses or example_losses)
    taken = [0] * len(clients)
    with _mode_kept(model):
        for index in range(rounds):
            progress("rounds", index, rounds)
            order = torch.Generator().manual_seed(seed * STRIDE + index)
            count = max(1, round(chosen * len(clients)))
            found = sorted(torch.randperm(len(clients), generator=order)[:count].tolist())
            seeds = [(seed * rounds + index) * STRIDE + i for i in found]
            _round(handle, name, [clients[i] for i in found], local, seeds)
            for i in found:
                taken[i] += steps
            if after is not None:
                after(index)
    progress("rounds", rounds, rounds)
    spent = (epsilon(local.share(data), noise, done, delta) for data, done in zip(clients, taken, strict=True))
    return Federated(tuple(taken), tuple(spent), sum(p.numel() for p in model.parameters() if p.requires_grad))


def recombine(clients: Sequence[Mapping[str, LowRank]], weights: Sequence[float] | None = None) -> dict[str, LowRank]:
    """Return the weighted mean of clients' low-rank changes, layer by layer, as FedSVD's server hands it out again.

    The mean is of the products B A, exact where the first factors are equal, and the best of the largest rank among the
    clients' where they are not. Its first factor has orthonormal rows.

    Args:
        clients: what `eckart.adapters(model).factors()` returns at each of them.
        weights: how much each counts, such as its number of examples; by default all alike.

    Raises:
        EckartError: if there are none, or they do not fit each other.
    """
    if not clients or any(client.keys() != clients[0].keys() for client in clients):
        raise EckartError(f"recombine needs one client or more with the same layers, got {len(clients)} that differ")
    shares = _shares([1.0] * len(clients) if weights is None else weights, len(clients))
    out = {}
    for layer, first in clients[0].items():
        own = [client[layer] for client in clients]
        wrong = next((pair for pair in own if pair.shape != first.shape), None)
        if wrong is not None:
            raise EckartError(f"{layer} is {first.shape} at one client and {wrong.shape} at another; give one model's")
        rank = max(pair.rank for pair in own)
        out[layer] = decomposed(_weighted(own, shares), rank)
    return out


def _weighted(pairs: Sequence[LowRank], shares: Sequence[float]) -> list[LowRank]:
    """Return the terms of a weighted sum: one where the first factors are equal."""
    ups = [share * pair.up.double() for share, pair in zip(shares, pairs, strict=True)]
    if all(torch.equal(pair.down, pairs[0].down) for pair in pairs):
        return [LowRank(torch.stack(ups).sum(0).to(pairs[0].dtype), pairs[0].down)]
    return [LowRank(up.to(pair.dtype), pair.down) for up, pair in zip(ups, pairs, strict=True)]


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of every example, (batch,): of its class, or the mean of its next tokens."""
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    each = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return each.sum(1) / (labels[:, 1:] >= 0).sum(1).clamp_min(1)  # -100 stands for no label


def _round(handle: Adapters, name: str, clients: Sequence[Batch], local: _Local, seeds: Sequence[int]) -> None:
    """Let clients train from the server's adapter, and put what the server makes of them on the model."""
    server = handle.state.described[name].recipe().server
    trained = {n: p for n, p in handle.model.named_parameters() if p.requires_grad}
    held = dict(handle.model.named_buffers())
    start = {n: t.detach().clone() for n, t in (trained | held).items()}
    shares = _shares([float(_count(data)) for data in clients], len(clients))
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in trained.items()}
    result = start
    try:
        for data, seed, share in zip(clients, seeds, shares, strict=True):
            _put(trained | held, start)
            _train(handle, data, local, seed)
            for n, parameter in trained.items():
                total[n] += share * parameter.detach().double()
        if not all(all_finite(value) for value in total.values()):
            raise EckartError("what the clients trained is no longer finite; use a smaller rate")
        result = start | total
    finally:
        _put(trained | held, result)
    if server is not None:
        factors = handle.factors(name)
        handle.put_factors({layer: server([pair], pair.rank) for layer, pair in factors.items()}, name)


@contextmanager
def _mode_kept(model: nn.Module) -> Iterator[None]:
    """Put a model back into the mode it is in."""
    before = model.training
    try:
        yield
    finally:
        model.train(before)


def _train(handle: Adapters, data: Batch, local: _Local, seed: int) -> None:
    """Take a client's steps of SGD."""
    model, random = handle.model.train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(handle.parameter_groups(local.rate))
    for step in range(local.steps):
        chosen = _drawn(data, local, random)
        with seeded(next(model.parameters()).device, seed * STRIDE + step):
            if local.noise:
                _private_gradients(model, chosen, local, random)
            else:
                (local.losses(model, chosen).mean() + handle.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


def _drawn(data: Batch, local: _Local, random: torch.Generator) -> dict[str, Tensor]:
    """Return a batch: as many as asked for, or each with one probability where privacy is accounted for."""
    count = _count(data)
    if local.noise:
        rows = (torch.rand(count, generator=random) < local.share(data)).nonzero().flatten()
    else:
        rows = torch.randperm(count, generator=random)[: local.batch]
    return {key: value[rows.to(value.device)] for key, value in data.items()}


def _private_gradients(model: nn.Module, batch: Batch, local: _Local, random: torch.Generator) -> None:
    """Set the gradients to the noisy mean of clipped ones; nobody in the batch means noise alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    sums: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in trained}
    if _count(batch):
        sums = clipped_gradients(model, lambda: local.losses(model, batch), local.clip)[0]
    for parameter in trained:
        noise = torch.randn(parameter.shape, generator=random).to(parameter)
        parameter.grad = (sums[parameter] + local.noise * local.clip * noise) / local.batch


def _put(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _count(data: Batch) -> int:
    return len(next(iter(data.values())))


def _shares(weights: Sequence[float], count: int) -> list[float]:
    if len(weights) != count or not all(weight > 0 for weight in weights):
        raise EckartError(f"weights must be {count} positive numbers, one for every client, got {list(weights)}")
    return [weight / sum(weights) for weight in weights]


def _active(model: nn.Module) -> str:
    """Return the name of the one active adapter."""
    handle = Adapters(model)
    handle.require_unmerged()
    if len(handle.active) != 1:
        raise EckartError(f"one adapter has to be active to be trained by clients, not {len(handle.active)}; use(NAME)")
    name = next(iter(handle.active))
    if not handle.count():
        raise EckartError(f"nothing of the adapter {name!r} trains, as it is of combined or earlier ones; use another")
    return name


def _check_method(described: Described, *, private: bool) -> None:
    """Raise an `EckartError` for an adapter that clients cannot train together."""
    recipe = described.recipe()
    if recipe.between is not None:
        raise EckartError(
            f"{described.method} with these settings changes between steps what it trains, differently at every "
            "client, so nothing can be averaged; give lift refresh=0 or sara progressive=0, or take lora or fedsvd"
        )
    if private and recipe.penalty is not None:
        raise EckartError(f"{described.method} adds a penalty to the loss; train it without noise")


def _check(
    clients: Sequence[Batch], rounds: int, steps: int, batch: int, rate: float, chosen: float, noise: float, clip: float
) -> None:
    """Check what training is asked for."""
    if min(rounds, steps, batch) < 1 or not rate > 0 or not 0 < chosen <= 1 or noise < 0 or not clip > 0:
        came = (
            f"rounds {rounds}, steps {steps}, batch {batch}, rate {rate}, chosen {chosen}, noise {noise}, clip {clip}"
        )
        raise EckartError(
            f"rounds, steps, batch, rate, clip must be positive, chosen a share, noise not negative; {came}"
        )
    for i, data in enumerate(clients):
        labelled = isinstance(data, Mapping) and "labels" in data
        if not labelled or len({len(value) for value in data.values()}) != 1 or not _count(data):
            raise EckartError(f"client {i} needs labels and as many examples in every tensor, at least one")
    if not clients:
        raise EckartError("federate needs the examples of one client or more, got none")
