"""What the options of every layer cost in operations or time, for one token, as in generating at batch 1.

Counted are the linear layers and the output head; attention, norms and a mere lookup of embeddings are not. A head tied
to a compressed embedding multiplies by the factored table, and its lookup counts as well.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from eckart.budget import BYTES, DENSE, FLOPS, SECONDS, Candidates, Option
from eckart.budget.latency import Latencies, between, grid, rising
from eckart.files.neurons import COLUMNS, ROWS
from eckart.files.sharing import SHARED
from eckart.fit import coded_blank
from eckart.hosts import EmbeddingHost, TiedHead, host, leaf
from eckart.maps import STORAGES, Dense, LinearMap, random_pivoted, storage
from eckart.methods.compress.fitting import by_rows, structure_name
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import EMBEDDING, HEAD, Layer, dense_bytes
from eckart.progress import Progress

# Layers of one shape are called in turn, as the model does, as long as their dense weights take no more bytes.
ALTERNATED_BYTES = 64 << 20
# An option that takes more than this share of the dense layer's time counts as taking all of it: less is noise.
WORTH = 0.95

Shape = tuple[int, int]
Curve = tuple[list[int], list[float]]  # sizes and their seconds


def costed(
    job: Job,
    layers: Sequence[Layer],
    table: Sequence[Candidates],
    latencies: Latencies,
    progress: Progress,
    sets: Sequence[tuple[Layer, Candidates]] = (),
) -> tuple[list[Candidates], list[tuple[Layer, Candidates]], float]:
    """Return candidates that know what the job's budget counts, of layers and of sets of them, and what the rest of the
    model costs.

    Args:
        job: the job.
        layers: its layers.
        table: their candidates.
        latencies: times measured on this device.
        progress: told of the stage "latency".
        sets: layers that may also become narrower together, with their candidates.
    """
    measure = job.request.limit.measure
    if measure not in (FLOPS, SECONDS):
        total = job.model.nbytes if measure == BYTES else job.model.numel
        fixed = total - sum(measure.of(layer.dense) for layer in table)
        if measure != BYTES or job.recipe.coding is None:
            return list(table), list(sets), fixed
        alone = _with_code_bytes(job, layers, table[: len(layers)])  # groups follow
        narrower = _with_code_bytes(job, [layer for layer, _ in sets], [found for _, found in sets])
        known_sets = [(layer, found) for (layer, _), found in zip(sets, narrower, strict=True)]
        return [*alone, *table[len(layers) :]], known_sets, fixed
    outside = _head_outside(job, layers)
    everything = [*zip(layers, table, strict=True), *outside, *sets]
    out = []
    if measure == FLOPS:
        known: dict[tuple[str, Shape, str, int], float] = {}
        for layer, candidates in everything:
            options = []
            for o in candidates.options:
                key = layer.kind, layer.shape, o.structure, o.rank
                if key not in known:
                    known[key] = _operations(job, layer, o)
                options.append(replace(o, flops=known[key]))
            out.append(replace(candidates, options=tuple(options)))
    else:
        timing = _Timing(job, everything, latencies)
        for i, (layer, candidates) in enumerate(everything):
            progress("latency", i, len(everything))
            out.append(replace(candidates, options=tuple(timing.timed(layer, o) for o in candidates.options)))
        progress("latency", len(everything), len(everything))
    inside, rest = len(table), len(table) + len(outside)
    together = [(layer, found) for (layer, _), found in zip(sets, out[rest:], strict=True)]
    return out[:inside], together, sum(measure.of(layer.dense) for layer in out[inside:rest])


def _with_code_bytes(job: Job, layers: Sequence[Layer], table: Sequence[Candidates]) -> list[Candidates]:
    """Return candidates with the bytes they take once their numbers are codes, dense ones among them."""
    known: dict[tuple[object, ...], int] = {}
    out = []
    for layer, candidates in zip(layers, table, strict=True):
        options = []
        for o in candidates.options:
            each = tuple((m.shape, m.bias, job.weight_dtype(m.name)) for m in layer.members)
            key = layer.kind, each, o.structure, o.rank
            if key not in known:
                known[key] = stored(job, layer, o).nbytes
            options.append(replace(o, nbytes=known[key]))
        out.append(replace(candidates, options=tuple(options)))
    return out


def stored(job: Job, layer: Layer, option: Option) -> Option:
    """Return an option as it is stored: its name and bytes where numbers become codes."""
    recipe, dtype = job.recipe, job.weight_dtype(layer.name)
    if recipe.coding is None:
        return option
    if layer.writers:
        nbytes = sum(member_bytes(job, member, layer, option) for member in layer.members)
        return replace(option, structure=structure_name(option, recipe.coding), nbytes=nbytes)
    apart = job.request.sizes and option.structure != DENSE
    if apart or option.structure.startswith(SHARED):  # such know their bytes: components, and parts of groups
        return replace(option, structure=structure_name(option, recipe.coding))
    map_: LinearMap = Dense(torch.empty(layer.shape, device="meta"))
    if option.structure != DENSE:
        map_ = example(job, layer, option.structure, option.rank, torch.device("meta"))
    map_ = coded_blank(map_, recipe.coding, dtype, table=by_rows(job, layer))
    # What is not in the matrix is the bias.
    nbytes = map_.nbytes + (option.numbers - map_.numbers) * dtype.itemsize
    return replace(option, structure=structure_name(option, recipe.coding), nbytes=nbytes)


def member_bytes(job: Job, member: Layer, reader: Layer, option: Option) -> int:
    """Return the bytes of one of the layers that become narrower together as an option of theirs is stored."""
    numbers, dtype = member.narrow_numbers(option.rank, reader), job.weight_dtype(member.name)
    own = 0 if option.structure == DENSE else member.index_bytes(option.rank, reader)
    if job.recipe.coding is None:
        if option.structure == DENSE:
            return dense_bytes(job, member.name, member.shape, member.bias)
        return numbers * dtype.itemsize + own
    map_ = coded_blank(
        Dense(torch.empty(member.narrow_shape(option.rank, reader), device="meta")), job.recipe.coding, dtype
    )
    return map_.nbytes + (numbers - map_.numbers) * dtype.itemsize + own


def _head_outside(job: Job, layers: Sequence[Layer]) -> list[tuple[Layer, Candidates]]:
    """Return the output head, dense, if it is none of the layers and tied to none."""
    head, covered = job.parts.head, {layer.name for layer in layers}
    if head is None or head in covered or (job.parts.tied and job.parts.embedding in covered):
        return []
    rows, columns = cast(nn.Linear, job.model.model.get_submodule(head)).weight.shape
    layer = Layer(head, HEAD, (rows, columns), 0, len(job.parts.blocks))
    return [(layer, Candidates(head, layer.shape, (Option(DENSE, min(rows, columns), 0, 0, 0.0),)))]


def _operations(job: Job, layer: Layer, option: Option) -> float:
    """Return the multiplications and additions of a layer for one token."""
    rows, columns = layer.shape
    looked_up = layer.kind == EMBEDDING
    if layer.writers:
        return 2.0 * sum(math.prod(member.narrow_shape(option.rank, layer)) for member in layer.members)
    if option.structure == DENSE:
        return 0.0 if looked_up and not job.parts.tied else 2.0 * rows * columns
    map_ = example(job, layer, option.structure, option.rank, torch.device("meta"))
    if not looked_up:
        return float(map_.flops(1))
    lookup = 2.0 * (map_.numbers - rows * option.rank)
    return lookup + map_.flops(1) if job.parts.tied else lookup


def example(job: Job, layer: Layer, structure: str, rank: int, device: torch.device) -> LinearMap:
    """Return a map of a structure and size with arbitrary numbers, float32."""
    if layer.kind == EMBEDDING and structure == "pivoted":
        return random_pivoted(layer.shape, rank, device, "columns")  # as embeddings are fitted
    if structure in STORAGES:
        return storage(structure).example(layer.shape, rank, device)
    family = job.recipe.family(structure)
    if family is None:
        raise AssertionError(f"no recipe offers {structure} without its family")
    return family.example(layer.shape, rank, device)


def _singles(layer: Layer, option: Option) -> list[tuple[Layer, str]]:
    """Return the single layers that an option is of, and what it makes of each."""
    if not layer.writers or option.structure == DENSE:
        return [(member, option.structure) for member in layer.members]
    return [(member, COLUMNS if member.name == layer.name else ROWS) for member in layer.members]


class _Timing:
    """The times of all options, one measurement per shape and structure."""

    def __init__(self, job: Job, everything: Sequence[tuple[Layer, Candidates]], latencies: Latencies) -> None:
        self.job, self.latencies = job, latencies
        self._offered: dict[tuple[bool, Shape, torch.dtype], dict[str, set[int]]] = {}
        self._curves: dict[tuple[bool, Shape, torch.dtype], dict[str, Curve]] = {}
        for layer, candidates in everything:
            for option in candidates.options[:-1]:
                for single, structure in _singles(layer, option):
                    offered = self._offered.setdefault(self._group(single), {})
                    offered.setdefault(structure, set()).add(option.rank)
        self._count = Counter(self._group(layer) for layer, _ in everything if not layer.writers)

    def _group(self, layer: Layer) -> tuple[bool, Shape, torch.dtype]:
        return layer.kind == EMBEDDING, layer.shape, self.job.weight_dtype(layer.name)

    def timed(self, layer: Layer, option: Option) -> Option:
        """Return an option with the seconds it takes for one token."""
        if layer.kind == EMBEDDING and not self.job.parts.tied:  # a lookup costs nothing, as long as it is one
            return replace(option, seconds=0.0 if option.structure == DENSE else math.inf)
        return replace(option, seconds=sum(self._seconds(*one, option.rank) for one in _singles(layer, option)))

    def _seconds(self, layer: Layer, structure: str, rank: int) -> float:
        dense = self._curve(layer, DENSE)[1][0]
        seconds = between(*self._curve(layer, structure), rank)
        return dense if seconds > WORTH * dense else seconds

    def _curve(self, layer: Layer, structure: str) -> Curve:
        """Return the times of a structure at some sizes; those of the dense layer at one."""
        group = self._group(layer)
        curves = self._curves.setdefault(group, {})
        if structure not in curves:
            sizes = [0] if structure == DENSE else grid(sorted(self._offered[group][structure]))
            curves[structure] = sizes, self._measured(layer, structure, sizes)
        return curves[structure]

    def _measured(self, layer: Layer, structure: str, sizes: list[int]) -> list[float]:
        looked_up, shape, dtype = self._group(layer)
        copies = max(1, min(self._count[self._group(layer)], ALTERNATED_BYTES // (math.prod(shape) * dtype.itemsize)))
        what = f"{'tied embedding' if looked_up else 'linear'} {shape[0]} x {shape[1]} {dtype} {copies} copies"

        def tasks() -> dict[str, Callable[[], object]]:
            others = {} if structure == DENSE else {f"{structure} {size}": size for size in sizes}
            with torch.random.fork_rng([]):
                made = {name: self._call(layer, structure, size, copies) for name, size in others.items()}
                return {DENSE: self._call(layer, DENSE, 0, copies), **made}

        if structure == DENSE:
            return [self.latencies.seconds(what, tasks)[DENSE]]
        # As shares of the dense layer measured beside them, so that tables from other times go together.
        seconds = self.latencies.seconds(f"{what} {structure} {sizes}", tasks)
        dense = self._curve(layer, DENSE)[1][0]
        return [dense * t / seconds[DENSE] for t in rising([seconds[f"{structure} {size}"] for size in sizes])]

    def _call(self, layer: Layer, structure: str, size: int, copies: int) -> Callable[[], object]:
        """Return one call with one token, of each of some equal layers in turn."""
        device, dtype = self.job.runner.device, self.job.weight_dtype(layer.name)
        hidden = torch.randn(1, 1, layer.shape[1], dtype=dtype, device=device)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        turns = itertools.cycle([self._one(layer, structure, size, hidden, ids) for _ in range(copies)])

        def call() -> object:
            return next(turns)()

        return call

    def _one(
        self, layer: Layer, structure: str, size: int, hidden: torch.Tensor, ids: torch.Tensor
    ) -> Callable[[], object]:
        if structure in (DENSE, ROWS, COLUMNS):
            rows, columns = layer.shape
            shape = {DENSE: (rows, columns), ROWS: (size, columns), COLUMNS: (rows, size)}[structure]
            weight, hidden = torch.randn(shape, dtype=hidden.dtype, device=hidden.device), hidden[..., : shape[1]]
            if layer.kind == EMBEDDING:
                return lambda: (F.embedding(ids, weight), F.linear(hidden, weight))
            dense = leaf(weight).requires_grad_(False)
            return lambda: dense(hidden)
        map_ = example(self.job, layer, structure, size, hidden.device).to(hidden.dtype)
        if layer.kind == EMBEDDING:
            table = EmbeddingHost(map_).requires_grad_(False)
            head = TiedHead(table)
            return lambda: (table(ids), head(hidden))
        module = host(map_).requires_grad_(False)
        return lambda: module(hidden)
