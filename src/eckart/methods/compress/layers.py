"""The layers a run may compress: what is known of each, and what each may become.

Embeddings and heads are layers too. A table E (V, d) is fitted under

    E sum_v f_v dE_v M dE_v^T,   f_v how often token v occurs (or is predicted), M the metric of its coordinates

with M the second moment B of the gradient at the embedding's output for a lookup, G of the head's input for an output
projection. A tied table serves both: f the mean of the two frequencies, M = B + G, one Kronecker metric, one closed
form.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from eckart.budget import Candidates, Option, candidates
from eckart.errors import EckartError
from eckart.fit import Metric, Regression, error_of, regress
from eckart.fit import metric as build_metric
from eckart.fit.families import Family
from eckart.hosts import linear_layers, map_of, offset_of
from eckart.maps import Storage, storage
from eckart.methods.compress.job import Job
from eckart.methods.compress.recipe import LayerData
from eckart.stats import CrossMoments, Gradients, Moments, Store, gradients_of, inputs_of, token_counts

# Share of the uniform distribution in token frequencies: tokens that the calibration text lacks still count.
FREQUENCY_SMOOTHING = 0.05
EMBEDDING, HEAD, LINEAR = "embedding", "head", "linear"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that may be compressed.

    Attributes:
        name: its module name.
        kind: "linear", "embedding" or "head".
        shape: (out, in); (vocabulary, width) for an embedding.
        bias: numbers in its bias.
        block: index of its block; -1 for an embedding, the number of blocks for a head.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bias: int
    block: int


def layers_of(job: Job) -> list[Layer]:
    """Return all layers a job may compress, in the model's order."""
    out = []
    parts, model = job.parts, job.model.model
    if job.recipe.embeddings and parts.embedding is not None:
        table = cast(Tensor, model.get_submodule(parts.embedding).weight)
        out.append(Layer(parts.embedding, EMBEDDING, (table.shape[0], table.shape[1]), 0, -1))
    for index, block in enumerate(parts.blocks):
        for name, module in linear_layers(model.get_submodule(block), block).items():
            out.append(_layer(name, LINEAR, module, index))
    if job.recipe.embeddings and parts.head is not None and not parts.tied:
        out.append(_layer(parts.head, HEAD, model.get_submodule(parts.head), len(parts.blocks)))
    return out


def _layer(name: str, kind: str, module: nn.Module, block: int) -> Layer:
    bias = offset_of(module)
    return Layer(name, kind, map_of(module).shape, 0 if bias is None else bias.numel(), block)


@dataclass(slots=True)
class Known:
    """The statistics of one block at a time, read from a store as a recipe needs them.

    Attributes:
        job: the job.
        store: its statistics.
    """

    job: Job
    store: Store
    _block: int = -2
    _inputs: dict[str, Moments] | None = None
    _gradients: dict[str, Gradients] | None = None

    def data(self, layer: Layer, weight: Tensor, cross: CrossMoments | None = None) -> LayerData | None:
        """Return what is known of a linear layer, or None if the calibration texts never reached it."""
        recipe = self.job.recipe
        if layer.block != self._block:
            self._block = layer.block
            self._inputs = inputs_of(self.store, layer.block) if recipe.uses_inputs else None
            self._gradients = (
                gradients_of(self.store, self.job.objective, layer.block) if recipe.uses_gradients else None
            )
        for known in (self._inputs, self._gradients):
            if known is not None and layer.name not in known:
                return None
        inputs = self._inputs[layer.name] if self._inputs is not None else None
        gradients = self._gradients[layer.name] if self._gradients is not None else None
        return LayerData(weight, inputs, gradients, cross)

    def head_data(self, layer: Layer, weight: Tensor, cross: CrossMoments | None = None) -> LayerData:
        """Return what is known of an output head: the Fisher matrix at its output is nearly diag(mean probability)."""
        recipe, inputs, gradients = self.job.recipe, None, None
        if recipe.uses_inputs:
            inputs = Moments.of(self.store.load("head-inputs", 0)["head"])
        if recipe.uses_gradients:
            ends = self.store.load(f"ends-{self.job.objective.name}", 0)["head"]
            probability = _smoothed(ends["probability"])
            gradients = Gradients(int(ends["count"]), probability, probability)
        return LayerData(weight, inputs, gradients, cross)

    def embedding_metric(self, layer: Layer) -> Metric:
        """Return the metric of a token embedding, and of the head tied to it."""
        recipe, vocabulary = self.job.recipe, layer.shape[0]
        if not recipe.output_metric:
            return Metric(outputs=self._frequencies(vocabulary)) if recipe.uses_inputs else Metric()
        ends = self.store.load(f"ends-{self.job.objective.name}", 0)
        counts, second = ends["embedding"]["counts"], ends["embedding"]["second"]
        frequencies = counts / counts.sum()
        if self.job.parts.tied:
            frequencies = (frequencies + ends["head"]["probability"]) / 2
            second = second + ends["head"]["second"]
        return build_metric(second, outputs=_smoothed(frequencies), input_shrinkage=recipe.embedding_shrinkage)

    def _frequencies(self, vocabulary: int) -> Tensor:
        counts = token_counts(self.job.calibration, vocabulary).to(self.job.runner.device)
        return _smoothed(counts / counts.sum())

    def metric(self, layer: Layer, weight: Tensor, cross: CrossMoments | None = None) -> Metric | None:
        """Return the metric of any layer; None if the calibration texts never reached it."""
        if layer.kind == EMBEDDING:
            return self.embedding_metric(layer)
        get = self.head_data if layer.kind == HEAD else self.data
        data = get(layer, weight, cross)
        return None if data is None else self.job.recipe.metric(data)

    def scale(self) -> float:
        """Return the factor from a fit's error to the predicted increase, in the objective's unit."""
        batches = self.job.calibration
        return self.job.objective.scale(sum(b.numel() for b in batches), sum(b.shape[0] for b in batches))


def _smoothed(frequencies: Tensor) -> Tensor:
    return (1 - FREQUENCY_SMOOTHING) * frequencies + FREQUENCY_SMOOTHING / frequencies.shape[0]


def unit_of(job: Job) -> str:
    """Return what predicted losses are measured in."""
    return job.objective.unit if job.recipe.output_metric else "relative squared error"


def predicted(known: Known, regression: Regression) -> Tensor:
    """Return the predicted loss of rank 0, 1, ... in the unit of `unit_of`, float64."""
    errors = regression.errors()
    if known.job.recipe.output_metric:
        return errors * known.scale()
    return errors / regression.total if regression.total > 0 else torch.zeros_like(errors)


def weights(job: Job, layers: list[Layer]) -> Iterator[tuple[Layer, Tensor]]:
    """Yield every layer with its weight (out, in) in float32, read when it is its turn."""
    for layer in layers:
        stored = job.model.read(f"{layer.name}.weight").to(job.runner.device, torch.float32)
        yield layer, stored if tuple(stored.shape) == layer.shape else stored.mT.contiguous()


def surveyed(
    job: Job, layers: list[Layer], known: Known, *, errors: bool, progress: Callable[[int], None]
) -> list[Candidates]:
    """Return the candidates of all layers.

    Args:
        job: the job.
        layers: its layers.
        known: their statistics.
        errors: whether losses are needed; without, they are all zero and nothing is decomposed.
        progress: called with the number of layers done.
    """
    if not errors:
        return [_candidates(job, layer, None) for layer in layers]
    out = []
    for i, (layer, weight) in enumerate(weights(job, layers)):
        progress(i)
        metric = known.metric(layer, weight)
        if metric is None:
            out.append(_candidates(job, layer, [0.0]))
            continue
        fitted = _fitted_options(job, known, layer, weight, metric) if layer.kind == LINEAR else []
        if fitted and not job.recipe.mixed:
            out.append(_with_options(_candidates(job, layer, [0.0]), fitted))
            continue
        regression = regress(weight, metric)
        score = job.recipe.score
        use_score = job.recipe.allocation == "threshold" and score is not None
        losses = score(weight, regression) if use_score and score is not None else predicted(known, regression)
        out.append(_with_options(_candidates(job, layer, losses, storage(job.recipe.storage)), fitted))
    return out


def _with_options(layer: Candidates, more: list[Option]) -> Candidates:
    """Return candidates with further options; those no smaller than dense, in numbers or bytes, are left out."""
    dense = layer.dense
    smaller = [o for o in (*layer.options[:-1], *more) if o.numbers < dense.numbers and o.nbytes < dense.nbytes]
    smaller.sort(key=lambda option: (option.numbers, option.loss))
    return replace(layer, options=(*smaller, layer.dense))


def _fitted_options(job: Job, known: Known, layer: Layer, weight: Tensor, metric: Metric) -> list[Option]:
    """Return the sizes of every family, each with the error of the map fitted at it."""
    itemsize = job.weight_dtype(layer.name).itemsize
    own = layer.bias or (layer.shape[0] if job.recipe.centred else 0)
    options, step = [], job.recipe.round_to
    for family in job.recipe.families:
        for size in sorted({size // step * step for size in family.sizes(layer.shape)} - {0}):
            numbers = family.numbers(layer.shape, size) + own
            nbytes = numbers * itemsize + family.index_bytes(layer.shape, size)
            loss = _fitted_loss(job, known, weight, metric, family, size)
            options.append(Option(family.name, size, numbers, nbytes, loss))
    return options


def _fitted_loss(job: Job, known: Known, weight: Tensor, metric: Metric, family: Family, size: int) -> float:
    """Return the predicted loss of a family at a size, in the unit of `unit_of`."""
    error = error_of(weight, family.fit(weight, metric, size).dense(), metric)
    if job.recipe.output_metric:
        return error * known.scale()
    zero = error_of(weight, torch.zeros_like(weight), metric)
    return error / zero if zero > 0 else 0.0


def foreseen(job: Job, layers: list[Layer], known: Known, chosen: dict[str, Option]) -> dict[str, Option]:
    """Return chosen options of linear layers with their predicted losses, which an allocation did without."""
    out = dict(chosen)
    for layer, weight in weights(job, layers):
        option = chosen[layer.name]
        family, metric = job.recipe.family(option.structure), known.metric(layer, weight)
        if family is not None and metric is not None:
            out[layer.name] = replace(option, loss=_fitted_loss(job, known, weight, metric, family, option.rank))
    return out


def _candidates(
    job: Job, layer: Layer, losses: Tensor | list[float] | None, stored: Storage | Family | None = None
) -> Candidates:
    """Return the ranks (or sizes of the recipe's one family) a layer may have; None for losses nobody will read."""
    families = job.recipe.families if layer.kind == LINEAR else ()
    stored = stored or (families[0] if families else storage(job.recipe.storage))
    found = candidates(
        layer.name,
        layer.shape,
        [0.0] * (stored.largest(layer.shape) + 1) if losses is None else losses,
        stored,
        itemsize=job.weight_dtype(layer.name).itemsize,
        bias=layer.bias,
        extra_bias=job.recipe.centred and layer.kind != EMBEDDING,
        round_to=job.recipe.round_to,
    )
    if not layer.bias:
        return found
    # A dense layer's bias may be stored in another dtype than its weight; a compressed layer's is not.
    wider = job.model.stored_dtype(f"{layer.name}.bias").itemsize - job.weight_dtype(layer.name).itemsize
    dense = replace(found.dense, nbytes=found.dense.nbytes + layer.bias * wider)
    return replace(found, options=(*found.options[:-1], dense))


def check_layers(job: Job, layers: list[Layer]) -> None:
    """Raise an `EckartError` if a model has nothing to compress."""
    if not layers:
        raise EckartError(f"{job.model.folder} has no linear layers that could be compressed")
