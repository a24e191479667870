"""The layers a run may compress: what is known of each, and what each may become.

Embeddings and heads are layers too. A table E (V, d) is fitted under

    E sum_v f_v dE_v M dE_v^T,   f_v how often token v occurs (or is predicted), M the metric of its coordinates

with M the second moment B of the gradient at the embedding's output for a lookup, G of the head's input for an output
projection. A tied table serves both: f the mean of the two frequencies, M = B + G, one Kronecker metric, one closed
form.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from eckart.budget import DENSE, Candidates, Option, candidates
from eckart.errors import EckartError
from eckart.fit import Metric, Regression, error_of, regress
from eckart.fit import metric as build_metric
from eckart.fit.families import Family
from eckart.hosts import Heads, Neurons, head_sizes, heads_of, is_conv1d, linear_layers, map_of, neurons_of, offset_of
from eckart.maps import LinearMap, Storage, storage
from eckart.methods.compress.job import Job
from eckart.methods.compress.recipe import LayerData
from eckart.stats import (
    CrossMoments,
    Gradients,
    Moments,
    Store,
    enter,
    gradients_of,
    inputs_of,
    token_counts,
    weight_gradients_of,
)

# Share of the uniform distribution in token frequencies: tokens that the calibration text lacks still count.
FREQUENCY_SMOOTHING = 0.05
EMBEDDING, HEAD, LINEAR, NEURONS, HEADS = "embedding", "head", "linear", "neurons", "heads"
INDEX = torch.int32


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that may be compressed, or several around hidden units or heads that become narrower together.

    Attributes:
        name: its module name; of hidden units and heads, that of the layer that reads them.
        kind: "linear", "embedding", "head" (to the vocabulary), "neurons" or "heads" (of attention).
        shape: (out, in); (vocabulary, width) for an embedding.
        bias: numbers in its bias.
        block: index of its block; -1 for an embedding, the number of blocks for a head.
        writers: for hidden units, the linear layers with a row per unit; for heads, those of queries, keys and values.
        heads: the heads, by name inside the block.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bias: int
    block: int
    writers: tuple["Layer", ...] = ()
    heads: Heads | None = None

    @property
    def members(self) -> "tuple[Layer, ...]":
        """The linear layers it consists of; itself, if it is one layer."""
        return (*self.writers, replace(self, kind=LINEAR, writers=(), heads=None)) if self.writers else (self,)

    @property
    def units(self) -> int:
        """How many hidden units, or channels per head, there are."""
        return self.shape[1] if self.heads is None else self.heads.size

    def narrow_shape(self, units: int, reader: "Layer") -> tuple[int, int]:
        """Return the shape of this layer with so many of the units, or channels per head, that `reader` reads."""
        m, n = self.shape
        return (m, n * units // reader.units) if self.name == reader.name else (m * units // reader.units, n)

    def narrow_numbers(self, units: int, reader: "Layer") -> int:
        """Return the numbers of this layer, bias included, with so many of the units that `reader` reads."""
        shape = self.narrow_shape(units, reader)
        own = shape[0] if reader.heads is None else self.shape[0]  # zeros among the biases of heads are stored
        return shape[0] * shape[1] + (own if self.bias else 0)

    def index_bytes(self, units: int, reader: "Layer") -> int:
        """Return the bytes that say which channels of heads a narrow matrix has; hidden units need none."""
        if reader.heads is None:
            return 0
        return INDEX.itemsize * self.narrow_shape(units, reader)[self.name == reader.name]


def layers_of(job: Job) -> list[Layer]:
    """Return all layers a job may compress, in the model's order; those that only become narrower together as one."""
    found = _single_layers(job)
    return found if job.recipe.together else merged(found, sets_of(job, found))


def _single_layers(job: Job) -> list[Layer]:
    out = []
    parts, model = job.parts, job.model.model
    if job.recipe.embeddings and parts.embedding is not None:
        table = cast(Tensor, model.get_submodule(parts.embedding).weight)
        out.append(Layer(parts.embedding, EMBEDDING, (table.shape[0], table.shape[1]), 0, -1))
    for index, block in enumerate(parts.blocks):
        inside = linear_layers(model.get_submodule(block), block)
        out.extend(_layer(name, LINEAR, module, index) for name, module in inside.items())
    if job.recipe.embeddings and parts.head is not None and not parts.tied and job.recipe.learner is None:
        out.append(_layer(parts.head, HEAD, model.get_submodule(parts.head), len(parts.blocks)))
    return out


def sets_of(job: Job, layers: Sequence[Layer]) -> list[Layer]:
    """Return the sets of layers around hidden units and heads, as the recipe asks for them, each as one layer.

    Args:
        job: the job.
        layers: its layers, one by one.
    """
    if not job.recipe.narrows:
        return []
    by_name, out = {layer.name: layer for layer in layers}, []
    for block, groups in zip(job.parts.blocks, _narrowing(job), strict=True):
        for group in groups:
            writers = tuple(by_name[f"{block}.{name}"] for name in group.into)
            kind, heads = (HEADS, group) if isinstance(group, Heads) else (NEURONS, None)
            out.append(replace(by_name[f"{block}.{group.out_of}"], kind=kind, writers=writers, heads=heads))
    return out


def merged(layers: Sequence[Layer], sets: Sequence[Layer]) -> list[Layer]:
    """Return layers with sets of them in place of the one that reads, and without those that write."""
    by_reader = {layer.name: layer for layer in sets}
    written = {writer.name for layer in sets for writer in layer.writers}
    return [by_reader.get(layer.name, layer) for layer in layers if layer.name not in written]


def stays_apart(layers: Sequence[Layer], chosen: Mapping[str, Option]) -> tuple[list[Layer], dict[str, Option]]:
    """Return layers and options in which sets of layers that stay dense are their members on their own."""
    out, options = list[Layer](), dict(chosen)
    for layer in layers:
        apart = layer.members if layer.writers and chosen[layer.name].structure == DENSE else ()
        options |= {member.name: replace(chosen[layer.name], rank=min(member.shape)) for member in apart}
        out += apart or [layer]
    return out, options


@torch.no_grad()
def _narrowing(job: Job) -> list[list[Neurons | Heads]]:
    """Return the hidden units and heads of every block; blocks with the same layers are tried once."""
    runner, model = job.runner, job.model.model
    ids = torch.arange(8)[None] % int(model.config.vocab_size)  # any few tokens will do
    stream = enter(runner, [ids])
    known: dict[tuple[tuple[str, tuple[int, int]], ...], list[Neurons | Heads]] = {}
    out = []
    for index, name in enumerate(job.parts.blocks):
        layers = linear_layers(model.get_submodule(name))
        alike = tuple((inner, map_of(module).shape) for inner, module in layers.items())
        if alike not in known:
            with runner.resident(name) as block:
                run = partial(runner.run, block, stream.hidden[0], stream.calls[0][index])
                known[alike] = list(neurons_of(block, run)) if job.recipe.neurons else []
                sizes = head_sizes(model.config.get_text_config())
                heads = heads_of(block, run, *sizes) if job.recipe.heads else None
                known[alike] += [heads] if heads else []
        out.append(known[alike])
    return out


def _layer(name: str, kind: str, module: nn.Module, block: int) -> Layer:
    bias = offset_of(module)
    return Layer(name, kind, map_of(module).shape, 0 if bias is None else bias.numel(), block)


@dataclass(slots=True)
class Known:
    """The statistics of one layer at a time, read from a store as a recipe needs them.

    Attributes:
        job: the job.
        store: its statistics.
    """

    job: Job
    store: Store
    _inputs: dict[str, Moments] = field(default_factory=dict)  # of the layers that share the latest input

    def data(self, layer: Layer, weight: Tensor, cross: CrossMoments | None = None) -> LayerData | None:
        """Return what is known of a linear layer, or None if the calibration texts never reached it."""
        recipe, gradients, inputs = self.job.recipe, None, None
        if cross is not None and cross.original is not None:
            inputs = cross.original
        elif recipe.uses_inputs:
            if layer.name not in self._inputs:
                self._inputs = inputs_of(self.store, layer.block, [layer.name])
            if layer.name not in self._inputs:
                return None
            inputs = self._inputs[layer.name]
        if recipe.uses_gradients:
            known = gradients_of(self.store, self.job.objective, layer.block, [layer.name])
            if layer.name not in known:
                return None
            gradients = known[layer.name]
        return LayerData(weight, inputs, gradients, cross)

    def forget(self) -> None:
        """Let go of what was read last: of a wide layer it is the largest tensor there is."""
        self._inputs = {}

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
            return Metric(outputs=self._frequencies(vocabulary)) if recipe.weighs_tokens else Metric()
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

    def scores(self, layer: Layer, weight: Tensor, regression: Regression) -> Tensor:
        """Return the scores of rank 0, 1, ... that the recipe's allocation compares."""
        recipe = self.job.recipe
        if recipe.score is None:
            raise AssertionError("checked when the recipe was made")
        gradient = None
        if recipe.uses_weight_gradients:
            gradient = weight_gradients_of(self.store, self.job.objective, layer.block, [layer.name])[layer.name]
        return recipe.score(LayerData(weight, weight_gradient=gradient), regression)

    def scale(self) -> float:
        """Return the factor from a fit's error to the predicted increase, in the objective's unit."""
        batches = self.job.calibration
        return self.job.objective.scale(sum(b.numel() for b in batches), sum(b.shape[0] for b in batches))


def _smoothed(frequencies: Tensor) -> Tensor:
    return (1 - FREQUENCY_SMOOTHING) * frequencies + FREQUENCY_SMOOTHING / frequencies.shape[0]


def type_of(layer: Layer) -> str:
    """Return what layers of one kind in different blocks share: the name without its numbers."""
    return ".".join(part for part in layer.name.split(".") if not part.isdigit())


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
        transposed = is_conv1d(job.model.model.get_submodule(layer.name))  # square ones do not show it
        yield layer, stored.mT.contiguous() if transposed else stored


def bias_of(job: Job, name: str) -> Tensor | None:
    """Return the bias of a layer as it is stored, float32, or None."""
    key = f"{name}.bias"
    return job.model.read(key).to(job.runner.device, torch.float32) if key in job.model.names else None


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
        return [layer_candidates(job, layer, None) for layer in layers]
    out = []
    for i, (layer, weight) in enumerate(weights(job, layers)):
        progress(i)
        metric = known.metric(layer, weight)
        if metric is None:
            out.append(layer_candidates(job, layer, [0.0]))
            continue
        fitted = _fitted_options(job, known, layer, weight, metric)
        if fitted and not job.recipe.mixed:
            out.append(_with_options(layer_candidates(job, layer, [0.0]), fitted))
            continue
        regression = regress(weight, metric)
        losses = known.scores(layer, weight, regression) if job.recipe.scores else predicted(known, regression)
        out.append(_with_options(layer_candidates(job, layer, losses, storage(job.recipe.storage)), fitted))
    return out


def _with_options(layer: Candidates, more: list[Option]) -> Candidates:
    """Return candidates with further options; those with more numbers than dense, or as many bytes, are left out."""
    dense = layer.dense
    smaller = [o for o in (*layer.options[:-1], *more) if o.numbers <= dense.numbers and o.nbytes < dense.nbytes]
    smaller.sort(key=lambda option: (option.numbers, option.loss))
    return replace(layer, options=(*smaller, layer.dense))


def _fitted_options(job: Job, known: Known, layer: Layer, weight: Tensor, metric: Metric) -> list[Option]:
    """Return the sizes of every family, each with the error of the map fitted at it."""
    itemsize = job.weight_dtype(layer.name).itemsize
    own = layer.bias or (layer.shape[0] if job.recipe.centred else 0)
    options, step = [], job.recipe.round_to
    for family in families_of(job, layer):
        fitted = family.fitter(weight, metric)
        for size in sorted({size // step * step for size in family.sizes(layer.shape)} - {0}):
            numbers = family.numbers(layer.shape, size) + own
            nbytes = family.nbytes(layer.shape, size, itemsize) + own * itemsize
            loss = map_loss(job, known, weight, metric, fitted(size))
            options.append(Option(family.name, size, numbers, nbytes, loss))
    return options


def families_of(job: Job, layer: Layer) -> tuple[Family, ...]:
    """Return the families a layer may become: any of linear layers, of tables those that store rows of codes."""
    if layer.writers:
        return ()
    return job.families if layer.kind == LINEAR else tuple(f for f in job.families if f.code_bytes)


def map_loss(job: Job, known: Known, weight: Tensor, metric: Metric, map_: LinearMap) -> float:
    """Return the predicted loss of a fitted map, in the unit of `unit_of`."""
    error = error_of(weight, map_.dense(), metric)
    if job.recipe.output_metric:
        return error * known.scale()
    zero = error_of(weight, torch.zeros_like(weight), metric)
    return error / zero if zero > 0 else 0.0


def errors_at(job: Job, layers: list[Layer], known: Known, chosen: dict[str, Option]) -> dict[str, float]:
    """Return E | T (W x - W' x^) |^2 of every layer at its chosen option; 0 for layers left dense, or never reached."""
    out = {}
    for layer, weight in weights(job, layers):
        option = chosen[layer.name]
        metric = None if option.structure == DENSE else known.metric(layer, weight)
        family = job.recipe.family(option.structure)
        if metric is None:
            out[layer.name] = 0.0
        elif family is None:
            out[layer.name] = float(regress(weight, metric).errors()[option.rank])
        else:
            out[layer.name] = error_of(weight, family.fit(weight, metric, option.rank).dense(), metric)
    return out


def layer_candidates(
    job: Job, layer: Layer, losses: Tensor | list[float] | None, stored: Storage | Family | None = None
) -> Candidates:
    """Return the ranks (or sizes of the recipe's one family) a layer may have; None for losses nobody will read."""
    if layer.writers:
        return _narrower(job, layer)
    families = families_of(job, layer)
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
    return with_dense_bytes(job, [layer], found)


def with_dense_bytes(job: Job, layers: Sequence[Layer], found: Candidates) -> Candidates:
    """Return the candidates of layers with the bytes that those take now: biases may have dtypes of their own."""
    nbytes = sum(dense_bytes(job, layer.name, layer.shape, layer.bias) for layer in layers)
    return replace(found, options=(*found.options[:-1], replace(found.dense, nbytes=nbytes)))


def dense_bytes(job: Job, name: str, shape: tuple[int, int], bias: int) -> int:
    """Return the bytes of a layer as it is stored in the original, given its name, shape and numbers in its bias."""
    own = bias * job.model.stored_dtype(f"{name}.bias").itemsize if bias else 0
    return math.prod(shape) * job.weight_dtype(name).itemsize + own


def _narrower(job: Job, layer: Layer) -> Candidates:
    """Return every number of hidden units, or channels per head, that a set of layers may have; losses are left out."""
    itemsize = job.weight_dtype(layer.name).itemsize
    units, options = layer.units, []
    step = job.recipe.round_to if layer.heads is None else math.lcm(job.recipe.round_to, layer.heads.units.shape[1])
    for count in (*range(step, units, step), units):
        numbers = sum(member.narrow_numbers(count, layer) for member in layer.members)
        nbytes = numbers * itemsize + sum(member.index_bytes(count, layer) for member in layer.members)
        options.append(Option(DENSE if count == units else layer.kind, count, numbers, nbytes, 0.0))
    return with_dense_bytes(job, layer.members, Candidates(layer.name, layer.shape, tuple(options)))


def check_layers(job: Job, layers: list[Layer]) -> None:
    """Raise an `EckartError` if a model has nothing to compress."""
    if not layers:
        raise EckartError(f"{job.model.folder} has no linear layers that could be compressed")
