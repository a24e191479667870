"""Truncate, correct, truncate again: the weights to be truncated last are those that earlier truncations led to.

    W_r the truncated weights,  g = dLoss/dW at W_r,    W <- W_r + < g, W_0 - W_r > / |g|^2  g,    W_0 the original ones

Every layer takes the projection of its way back onto its gradient, all at once; the gradients are those of one sample,
drawn at random. Then moments, gradients and ranks are found anew, on the corrected weights. Layers that stay dense keep
the original weights. What a correction leaves is on disk, block by block: a run that was stopped goes on behind the
last complete one.

Source: Abbasi et al. 2026, "Zero Sum SVD", as in mint-vu/Zero-Sum-SVD.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from eckart.files.folder import OpenModel
from eckart.fit import regress
from eckart.hosts import Blockwise, is_conv1d
from eckart.methods.compress.allocate import allocate, is_dense
from eckart.methods.compress.collect import collect
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import Known, Layer, weights
from eckart.progress import Progress
from eckart.stats import Store, weight_gradients_of

WEIGHTS = "weights"


@dataclass(slots=True)
class ChangedModel(OpenModel):
    """A model some of whose weights are not those of its folder.

    Attributes:
        changed: the block by the name of every weight that differs.
        store: where those are.
    """

    changed: dict[str, int]
    store: Store

    def read(self, name: str) -> Tensor:
        """Return the tensor behind a name of the model's state dict; changed ones in float32."""
        if name not in self.changed:
            return OpenModel.read(self, name)
        return self.store.load(WEIGHTS, self.changed[name], lambda part: part == name)[name]["weight"].cpu()


def corrected(job: Job, layers: Sequence[Layer], known: Known, folder: Path, progress: Progress) -> Known:
    """Return the statistics, and the weights behind them, that a recipe's corrections lead to.

    Args:
        job: the job.
        layers: its layers.
        known: the statistics of the original model.
        folder: where what is made on the way is kept.
        progress: told of the stages of every truncation.
    """
    stores = [Store(folder / f"correction-{i:02d}", job.runner.device) for i in range(1, job.recipe.corrections + 1)]
    count = len(job.parts.blocks)
    done = next((i for i in range(len(stores), 0, -1) if stores[i - 1].has(WEIGHTS, count)), 0)
    if done:
        known = _known(job, stores[done - 1], progress)
    for i, store in enumerate(stores[done:], done):
        truncated = Store(folder / "truncated", job.runner.device)
        truncated.clear()
        _truncate(job, list(layers), known, truncated, progress)
        _correct(job, list(layers), _known(_one_sample(job, i), truncated, progress), store)
        if i:
            stores[i - 1].clear()
        truncated.clear()
        known = _known(job, store, progress)
    return known


def _truncate(job: Job, layers: list[Layer], known: Known, store: Store, progress: Progress) -> None:
    """Write the weights of every layer at the rank that its scores give it; nothing of layers that stay dense."""
    chosen = allocate(known.job, layers, known, predict=False, progress=progress).chosen
    parts: list[dict[str, Tensor]] = [{} for _ in job.parts.blocks]
    for layer, weight in weights(known.job, [layer for layer in layers if not is_dense(chosen[layer.name])]):
        metric, rank = known.metric(layer, weight), chosen[layer.name].rank
        if metric is not None:
            kept = regress(weight, metric, rank=rank).factors(rank).dense()
            parts[layer.block][layer.name] = kept.to(weight.dtype)
    _save(job, parts, store)


def _correct(job: Job, layers: list[Layer], truncated: Known, store: Store) -> None:
    """Write the corrected weights of the truncated layers."""
    written = {name for index in range(len(job.parts.blocks)) for name in truncated.store.load(WEIGHTS, index)}
    inside = [layer for layer in layers if f"{layer.name}.weight" in written]
    parts: list[dict[str, Tensor]] = [{} for _ in job.parts.blocks]
    for (layer, original), (_, kept) in zip(weights(job, inside), weights(truncated.job, inside), strict=True):
        gradients = weight_gradients_of(truncated.store, job.objective, layer.block, [layer.name])
        if layer.name in gradients:  # the sample may not reach every layer
            kept = kept + projected(original - kept, gradients[layer.name])
        parts[layer.block][layer.name] = kept
    _save(job, parts, store)


def projected(way: Tensor, gradient: Tensor) -> Tensor:
    """Return the projection of one matrix onto the line of another, in its own dtype; zero for a gradient of zero."""
    g, length = gradient.double(), gradient.double().square().sum()
    share = (way.double() * g).sum() / length if length > 0 else torch.zeros_like(length)
    return (share * g).to(way.dtype)


def _one_sample(job: Job, number: int) -> Job:
    """Return a job with one of its calibration samples, drawn for a correction."""
    if job.samples is None:
        raise AssertionError("a job with gradients has a text")
    windows = [sample for batch in job.calibration for sample in batch.split(1)]
    generator = torch.Generator().manual_seed(job.request.seed + number)
    drawn = windows[int(torch.randint(len(windows), (1,), generator=generator))]
    return replace(job, samples=replace(job.samples, batches=[drawn]))


def _save(job: Job, parts: list[dict[str, Tensor]], store: Store) -> None:
    """Write weights as the model's files have them, a file for every block."""
    for index, inside in enumerate(parts):
        stored = {}
        for name, weight in inside.items():
            transposed = is_conv1d(job.model.model.get_submodule(name))
            stored[f"{name}.weight"] = {"weight": (weight.mT if transposed else weight).contiguous()}
        store.save(WEIGHTS, index, stored)


def _known(job: Job, store: Store, progress: Progress) -> Known:
    """Return the statistics of a model with the weights in a store, gathered beside them."""
    changed = {name: i for i in range(len(job.parts.blocks)) for name in store.load(WEIGHTS, i)}
    own = {field.name: getattr(job.model, field.name) for field in fields(OpenModel)}
    model = ChangedModel(**own, changed=changed, store=store)
    runner = Blockwise(model.model, job.parts, model.load, job.runner.device)
    there = replace(job, model=model, runner=runner)
    collect(there, store, Store(store.folder / "boundaries"), progress)
    return Known(there, store)
