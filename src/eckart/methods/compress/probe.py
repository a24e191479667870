"""Measuring what compressing one layer alone does to the model, for allocators that would rather know."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from eckart.budget import Candidates, Option
from eckart.fit import regress
from eckart.hosts import host, offset_of, replace
from eckart.methods.compress.fitting import fit_layer, running, running_embedding, tied_head
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import HEAD, LINEAR, Known, Layer, weights
from eckart.methods.compress.measure import divergence, next_token_loss
from eckart.stats import Stream, advance, content_key, enter

# Batches of calibration samples that probes run on: 4,096 tokens each.
PROBE_BATCHES = 2

Probes = Mapping[str, Sequence[Option]]


def probe(
    job: Job, known: Known, layers: Sequence[Layer], options: Probes, *, observed: bool, progress: Callable[[int], None]
) -> dict[tuple[str, int], float]:
    """Measure the model with one layer at one option, for all of them.

    Args:
        job: the job.
        known: its statistics.
        layers: the layers.
        options: options to measure by layer name.
        observed: measure the increase of the next-token loss; otherwise the divergence from the original.
        progress: called with the number of blocks done.

    Returns:
        The measured increase by (layer name, rank).
    """
    samples = job.calibration[:PROBE_BATCHES]
    stream = enter(job.runner, samples)
    last = _finished(job, stream)
    base = next_token_loss(job.runner, samples, last) if observed else 0.0

    def measured(hidden: Sequence[Tensor], head: Mapping[str, nn.Module] | None = None) -> float:
        if observed:
            return next_token_loss(job.runner, samples, hidden, head) - base
        return divergence(job.runner, samples, last, hidden, head)

    out = _ends(job, known, layers, options, samples, last, measured)
    for index, name in enumerate(job.parts.blocks):
        progress(index)
        inside = [
            layer for layer in layers if layer.kind == LINEAR and layer.block == index and options.get(layer.name)
        ]
        with job.runner.resident(name) as block:
            variants = _variants(job, known, inside, options, block, name, stream)
            advance(job.runner, block, index, stream)
        for later in range(index + 1, len(job.parts.blocks)):
            with job.runner.resident(job.parts.blocks[later]) as block:
                for variant in variants.values():
                    advance(job.runner, block, later, variant)
        out.update({key: measured(variant.hidden) for key, variant in variants.items()})
    return out


def remembered(
    job: Job, known: Known, options: Probes, measure: Callable[[], dict[tuple[str, int], float]]
) -> dict[tuple[str, int], float]:
    """Return what `measure` returns, kept beside the statistics: probes do not depend on the budget."""
    asked = [f"{name} {o.structure} {o.rank}" for name, several in options.items() for o in several]
    settings = sorted((name, repr(value)) for name, value in job.request.settings.items())
    kind = f"probe-{content_key((job.request.method, repr(settings), *asked), [])[:16]}"
    if known.store.has(kind, 1):
        held = known.store.load(kind, 0)
        return {(name, int(rank)): float(value) for name, ranks in held.items() for rank, value in ranks.items()}
    measured = measure()
    parts: dict[str, dict[str, Tensor]] = {}
    for (name, rank), value in measured.items():
        parts.setdefault(name, {})[str(rank)] = torch.tensor(value, dtype=torch.float64)
    known.store.save(kind, 0, parts)
    return measured


def _ends(
    job: Job,
    known: Known,
    layers: Sequence[Layer],
    options: Probes,
    samples: list[Tensor],
    last: list[Tensor],
    measured: Callable[..., float],
) -> dict[tuple[str, int], float]:
    """Measure options of the embedding (with the head tied to it) and of a head of its own."""
    out = {}
    for layer, weight in weights(job, [layer for layer in layers if layer.kind != LINEAR and options.get(layer.name)]):
        for option in options[layer.name]:
            fit = fit_layer(job, known, layer, weight, option, dtype=torch.float32)
            if layer.kind == HEAD:
                out[layer.name, option.rank] = measured(last, {layer.name: running(fit)})
                continue
            embedding = running_embedding(job, fit)
            finished = _finished(job, enter(job.runner, samples, embedding))
            out[layer.name, option.rank] = measured(finished, tied_head(job, embedding))
    return out


def _finished(job: Job, stream: Stream) -> list[Tensor]:
    """Return the last block's outputs of a stream that stays where it is."""
    whole = Stream(list(stream.hidden), stream.calls)
    for index, name in enumerate(job.parts.blocks):
        with job.runner.resident(name) as block:
            advance(job.runner, block, index, whole)
    return whole.hidden


@torch.no_grad()
def _variants(
    job: Job, known: Known, layers: list[Layer], options: Probes, block: nn.Module, name: str, stream: Stream
) -> dict[tuple[str, int], Stream]:
    """Return the stream behind the block for every layer and option."""
    out = {}
    for layer, weight in weights(job, layers):
        metric = known.metric(layer, weight)
        if metric is None:
            continue
        regression, inner = regress(weight, metric), layer.name.removeprefix(f"{name}.")
        for option in options[layer.name]:
            fit = regression.fit(option.rank, bias=offset_of(block.get_submodule(inner)))
            original = replace(block, inner, host(fit.map, fit.bias))
            variant = Stream(list(stream.hidden), stream.calls)
            advance(job.runner, block, layer.block, variant)
            replace(block, inner, original)
            out[layer.name, option.rank] = variant
    return out


def levels(layer: Candidates, shares: Sequence[float]) -> list[Option]:
    """Return the largest option within each share of a layer's numbers, each once."""
    out: list[Option] = []
    for share in shares:
        fits = [o for o in layer.options[:-1] if o.numbers <= share * layer.dense.numbers]
        if fits and fits[-1] not in out:
            out.append(fits[-1])
    return out
