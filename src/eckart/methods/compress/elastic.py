"""Elastic folders: components in order of importance, so that one folder gives every size without data.

All sizes are compressed side by side, block by block. A layer has one up factor U and a down factor V_s for every size
s, of which its rank k_s takes the first columns and rows:

    min over U and V_s of  sum over sizes s  E | T (W x_s - U_s V_s x^_s) |^2,    columns of U B-orthogonal

U starts as the best of rank k for one V, on what the layer sees at all the sizes together; then the V_s = (U^T B U)^-1
U^T B W C_s G^_s^-1 and U (fit/refit.py) take turns. The order over all layers is that of the knapsack: the loss
predicted to be saved per number.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from eckart.atomic import write_tensors
from eckart.budget import DENSE, Candidates, Option, hull, upgrades
from eckart.errors import EckartError
from eckart.files.components import CodeLayout, coded_map
from eckart.files.elastic import (
    FOLDER,
    ORDER,
    Elastic,
    ElasticLayer,
    built_map,
    coded_downs,
    read_order_file,
    switches,
    write_order,
)
from eckart.files.writing import LayerRecord, Partial
from eckart.fit import Metric, coded, regress
from eckart.fit.components import down_codes, up_codes
from eckart.fit.refit import shared_up
from eckart.hosts import EmbeddingHost, embedding_host, host, offset_of, replace
from eckart.maps import Dense, LinearMap, LowRank
from eckart.methods.compress.allocate import Allocation, budget_of, plan_of
from eckart.methods.compress.costs import stored
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import EMBEDDING, HEAD, LINEAR, Known, Layer, bias_of, unit_of, weights
from eckart.methods.compress.limits import Limit
from eckart.methods.compress.outcome import Plan, SizePlan
from eckart.methods.compress.sweep import Pair, Sweep, stored_tensors
from eckart.progress import Progress
from eckart.stats import CrossMoments, CrossSum, Stream, advance, enter, load_hidden, save_hidden

# Components are fitted at sizes of about this ratio, so more closely where the same share is more of what is left: with
# equal steps of 0.05, sizes between the smallest two lost 4 % more than direct compression (docs/LOG.md).
RATIO = 1.05
# How often up and down factors take turns: the second time still gains at the smallest sizes (docs/LOG.md).
ROUNDS = 2


def sizes_of(limit: Limit, least: float) -> tuple[float, ...]:
    """Return the sizes that components are fitted at, from `least` to the limit, about `RATIO` times one another.

    Raises:
        EckartError: if parameters are not what is limited, or the least size is not below the limit.
    """
    keep = limit.amount
    if limit.option != "keep":
        raise EckartError(f"the sizes of an elastic folder are shares of the parameters; give keep, not {limit}")
    if not isinstance(least, int | float) or isinstance(least, bool) or not 0.0 < least < keep:
        raise EckartError(f"an elastic folder of keep {keep:g} needs a least size between 0 and that, got {least!r}")
    steps = max(1, round(math.log(keep / least, RATIO)))
    return (least, *(round(least * (keep / least) ** (i / steps), 6) for i in range(1, steps)), keep)


def check_elastic(job: Job) -> None:
    """Raise an `EckartError` unless the components of a recipe can be ordered."""
    recipe = job.recipe
    other = recipe.families or recipe.narrows or recipe.plain or recipe.sharing is not None
    changed = (
        recipe.update or recipe.heal or recipe.centred or recipe.uses_weight_gradients or recipe.learner is not None
    )
    if other or changed or recipe.allocation != "knapsack":
        raise EckartError(
            f"{job.request.method} with these settings cannot be elastic; that needs a low-rank map of its own for "
            "every layer, without healing, update or bias, and allocation=knapsack, as the method eckart has by default"
        )
    if recipe.bits and recipe.storage != "lowrank":
        raise EckartError(
            f"{job.request.method} with these settings cannot be elastic: codes of {recipe.storage} maps are those of "
            "one rank and cannot be cut; give storage=lowrank"
        )


def ordered(job: Job, layers: Sequence[Layer], table: Sequence[Candidates], partial: Partial) -> Elastic:
    """Return the order of all components, before anything is fitted, as a run that was stopped has left it if one has.

    Raises:
        EckartError: if the least size cannot be met.
    """
    path = partial.path(f"{FOLDER}-{ORDER}")
    if not path.is_file():
        write_order(order_of(job, layers, table), path)
    return read_order_file(path, job.request.model)


def order_of(job: Job, layers: Sequence[Layer], table: Sequence[Candidates]) -> Elastic:
    """Return the order of all components, whatever an earlier run has left.

    Raises:
        EckartError: if the least size cannot be met.
    """
    sizes, dense = job.request.sizes, sum(c.dense.numbers for c in table)
    for size in sizes:
        budget_of(job, table, job.model.numel - dense, Limit("keep", size))
    at = {candidate.name: i for i, candidate in enumerate(table)}
    steps = [(c.name, hull(c.options)[0]) for c in table] + upgrades(table)
    pairs = [[at[name], 0 if option is table[at[name]].dense else option.rank] for name, option in steps]
    made = [_layer(job, layer, tuple(len(sizes) * [min(layer.shape)])) for layer in layers]
    coding = job.recipe.coding
    learned = coding is not None and coding.levels == "learned"
    first = Elastic(
        job.request.model,
        sizes,
        job.model.numel,
        job.model.numel - dense,
        job.recipe.storage,
        unit_of(job),
        job.parts.head if job.parts.tied else None,
        tuple(made),
        torch.tensor(pairs, dtype=torch.int32),
        torch.tensor([option.loss for _, option in steps], dtype=torch.float64),
        None if coding is None else CodeLayout(coding.bits, coding.group_size, not coding.symmetric, learned),
    )
    largest = first.plan(sizes[-1])
    last = {name: option.rank for name, option in steps if option is not table[at[name]].dense}
    bounds = [sizes[0], *switches(sizes), sizes[-1]]
    ranks: dict[str, list[int]] = {layer.name: [] for layer in layers}
    for i, size in enumerate(sizes):
        plans = [first.plan(each) for each in (bounds[i], size, bounds[i + 1])]
        for name, found in ranks.items():
            cuts = [plan[name].rank for plan in plans]
            # between a rank and dense, what is nearest below dense may be chosen
            found.append(0 if not any(cuts) else max([*cuts, *found]) if all(cuts) else last[name])
    exact = []
    for layer in first.layers:
        most = largest[layer.name].rank
        # the folder cannot give a layer dense that it does not hold dense, even if that would fit at a smaller size
        held = tuple(rank or most for rank in ranks[layer.name])
        exact.append(dataclasses.replace(layer, ranks=held, dense=most == 0))
    return dataclasses.replace(first, layers=tuple(exact))


def _layer(job: Job, layer: Layer, ranks: tuple[int, ...]) -> ElasticLayer:
    part = {EMBEDDING: EMBEDDING, HEAD: HEAD}.get(layer.kind, f"block-{layer.block:04d}")
    kind = EMBEDDING if layer.kind == EMBEDDING else LINEAR
    module = job.model.model.get_submodule(layer.name)
    padding = cast("int | None", module.padding_idx) if layer.kind == EMBEDDING else None
    shared = layer.kind == EMBEDDING or not job.recipe.sequential
    itemsize = job.weight_dtype(layer.name).itemsize
    own = job.model.stored_dtype(f"{layer.name}.bias").itemsize if layer.bias else 0
    coded_bytes = 0
    if job.recipe.coding is not None:
        numbers = math.prod(layer.shape) + layer.bias
        coded_bytes = stored(job, layer, Option(DENSE, min(layer.shape), numbers, 0, 0.0)).nbytes
    sizes = itemsize, own, coded_bytes
    return ElasticLayer(layer.name, kind, layer.shape, part, layer.bias, padding, True, shared, ranks, *sizes)


def chosen_of(elastic: Elastic) -> dict[str, Option]:
    """Return what every layer becomes at the largest size."""
    full = {layer.name: min(layer.shape) for layer in elastic.layers}
    return {
        name: Option(elastic.stored if cut.rank else DENSE, cut.rank or full[name], cut.numbers, cut.nbytes, cut.loss)
        for name, cut in elastic.plan(elastic.sizes[-1]).items()
    }


def elastic_plan(job: Job, layers: Sequence[Layer], table: Sequence[Candidates]) -> Plan:
    """Return the plan of an elastic folder: of its largest size by layer, of every size as a whole."""
    elastic = order_of(job, layers, table)
    sizes = []
    for keep in elastic.sizes:
        cut = elastic.plan(keep)
        sizes.append(SizePlan(keep, *elastic.figures(cut, job.model.nbytes), sum(one.loss for one in cut.values())))
    largest = plan_of(job, layers, Allocation(chosen_of(elastic), list(table), elastic.fixed))
    held = sum(elastic.held_bytes(layer) for layer in elastic.layers)
    return dataclasses.replace(largest, sizes=tuple(sizes), components=held)


class ElasticSweep(Sweep):
    """A compressing pass at all sizes of an elastic folder, which writes the largest and the components of all.

    Args:
        job: the job.
        known: its statistics.
        layers: its layers.
        found: what each becomes at the largest size.
        elastic: the order of their components.
        partial: where finished parts are written.
        progress: told of the stage "compress".
    """

    def __init__(
        self,
        job: Job,
        known: Known,
        layers: Sequence[Layer],
        found: Allocation,
        elastic: Elastic,
        partial: Partial,
        progress: Progress,
    ) -> None:
        super().__init__(job, known, layers, found, partial, progress)
        self.elastic = elastic
        self.described = {layer.name: layer for layer in elastic.layers}
        if job.recipe.coding is None:
            self.layers = [layer for layer in layers if any(self.described[layer.name].ranks)]
        # Without a sequential pass nothing depends on the size.
        self.plans = [elastic.plan(s) for s in (elastic.sizes if job.recipe.sequential else elastic.sizes[-1:])]
        self.followers: list[Stream] = []
        self.embeddings: list[EmbeddingHost | None] = [None] * len(self.plans)

    def _fitted(
        self, layer: Layer, weight: Tensor, crosses: Sequence[CrossMoments], held: dict[str, Tensor]
    ) -> list[LinearMap | None]:
        """Fit a layer's components and put them into `held`; return its map at every size, None where it is dense and
        no codes.

        `crosses` are the joint moments of its input over all sizes together, then those at every size; none without a
        sequential pass.
        """
        described, name = self.described[layer.name], layer.name
        dtype = self.job.weight_dtype(name)
        metric = self.known.metric(layer, weight, crosses[0] if crosses else None)
        if metric is None:
            raise EckartError(f"the calibration texts never reach {name}, so it cannot be fitted")
        if self.elastic.codes is not None:
            return self._codes(layer, weight, metric, crosses, held, self.elastic.codes)
        factors = regress(weight, metric, rank=max(described.ranks)).factors(max(described.ranks))
        best = factors.up
        if described.shared:
            held[f"{name}.down"] = down = factors.down.to(dtype)
            downs = [down] * len(self.plans)
        else:
            seen = [self.known.metric(layer, weight, cross) or metric for cross in crosses[1:]]
            best, downs = shared_up(weight, best, described.ranks, seen, rounds=ROUNDS)
            tensors, downs = coded_downs(described, downs, dtype)
            held |= tensors
        held[f"{name}.up"] = up = best.mT.to(dtype)
        cuts = [plan[name].rank for plan in self.plans]
        return [
            built_map(up[:k], down[:k], self.elastic.stored, table=layer.kind == EMBEDDING) if k else None
            for k, down in zip(cuts, downs, strict=True)
        ]

    def _codes(
        self,
        layer: Layer,
        weight: Tensor,
        metric: Metric,
        crosses: Sequence[CrossMoments],
        held: dict[str, Tensor],
        layout: CodeLayout,
    ) -> list[LinearMap | None]:
        """Do what `_fitted` does with codes; a layer that is dense at some sizes has one matrix of codes for all."""
        described, name, coding = self.described[layer.name], layer.name, self.job.recipe.coding
        if coding is None:
            raise AssertionError("a folder of codes is made by a recipe with codes")
        dtype, table = self.job.weight_dtype(name), layer.kind == EMBEDDING
        seen = [self.known.metric(layer, weight, cross) or metric for cross in crosses[1:]] or [metric]
        cuts = [plan[name].rank for plan in self.plans]
        dense = None
        if 0 in cuts:
            dense = coded(Dense(weight), weight, seen[-1], coding, dtype, table=table)
        if not any(cuts):
            return [dense] * len(cuts)
        most = max(described.ranks)
        factors = regress(weight, metric, rank=most).factors(most)
        if not described.shared:
            best, solved = shared_up(weight, factors.up, described.ranks, seen, rounds=ROUNDS)
            factors = LowRank(best, max(solved, key=len))
        ups = up_codes(factors, metric, coding, dtype, table=table)
        downs = {}
        for i in described.down_sizes:
            first, at = described.ranks[i], seen[i] if len(seen) > 1 else seen[0]
            cut = ups.leading(ups.shape[0], first) if table else ups.leading(first, ups.width)
            downs[i] = down_codes(weight, cut, at, coding, dtype, table=table)
        held |= layout.tensors(f"{name}.up", ups)
        for i, down in downs.items():
            held |= layout.tensors(f"{name}.down.{i}", down)
        nearest = [described.down_size(i) for i in range(len(cuts))] if len(cuts) > 1 else described.down_sizes[-1:]
        return [coded_map(ups, downs[i], k, table=table) if k else dense for k, i in zip(cuts, nearest, strict=True)]

    def _record(self, layer: Layer, map_: LinearMap, bias: Tensor | None, padding_idx: int | None) -> LayerRecord:
        cut, kind = self.plans[-1][layer.name], self.described[layer.name].kind
        planned = None if self.elastic.codes is None else (self.elastic.structure(cut), cut.rank or min(layer.shape))
        return LayerRecord.of(layer.name, map_, bias, cut.loss, kind=kind, padding_idx=padding_idx, planned=planned)

    def _embedding(self) -> dict[str, EmbeddingHost]:
        for layer, weight in weights(self.job, [layer for layer in self.layers if layer.kind == EMBEDDING]):
            held: dict[str, Tensor] = {}
            maps = self._fitted(layer, weight, [], held)
            self._save_components(EMBEDDING, held)
            padding = self.described[layer.name].padding_idx
            modules = [None if map_ is None else embedding_host(map_.to(torch.float32), padding) for map_ in maps]
            self.embeddings, last, module = modules, maps[-1], modules[-1]
            if last is None or module is None:
                return {}
            if not self.partial.has(EMBEDDING):
                record = self._record(layer, last, None, padding)
                self.partial.save(EMBEDDING, stored_tensors(self.job, layer.name, module), [record])
            return {layer.name: module}
        return {}

    def _enter(self, embedding: nn.Module | None, done: int) -> dict[str, Pair]:
        pairs = super()._enter(embedding, done)
        for i, module in enumerate(self.embeddings[:-1]):
            stream = enter(self.job.runner, self.job.calibration, module)
            if done:
                stream.hidden[:] = load_hidden(self.streams, done, self.job.runner.device, f"size-{i}")
            self.followers.append(stream)
        return pairs

    def _block(self, index: int, pairs: dict[str, Pair]) -> None:
        job, name = self.job, self.job.parts.blocks[index]
        inside = {layer.name: layer for layer in self.layers if layer.block == index}
        records: list[LayerRecord] = []
        held: dict[str, Tensor] = {}
        with job.runner.resident(name) as block:
            copies = [copy.deepcopy(block) for _ in self.plans]
            for group in self._groups(block, name, index, pairs, inside):
                crosses = self._crosses(block, copies, group[0], name, index, pairs)
                for layer, weight in weights(job, [inside[member] for member in group]):
                    inner = layer.name.removeprefix(f"{name}.")
                    bias = offset_of(block.get_submodule(inner))
                    maps = self._fitted(layer, weight, crosses, held)
                    for map_, inside_size in zip(maps, copies, strict=True):
                        if map_ is not None:
                            replace(inside_size, inner, host(map_.to(torch.float32), bias))
                    if maps[-1] is not None:
                        own = None if bias is None else bias.to(maps[-1].dtype)
                        records.append(self._record(layer, maps[-1], own, None))
            self._advance_originals(block, index, pairs)
        written = {record.name: inside[record.name] for record in records}
        self._save_components(f"block-{index:04d}", held)
        for i, (stream, smaller) in enumerate(zip(self.followers, copies, strict=False)):
            advance(job.runner, smaller, index, stream)
            save_hidden(self.streams, index + 1, stream.hidden, f"size-{i}")
        self._commit(index, copies[-1], written, records, pairs)
        for i in range(len(self.followers)):
            self.streams.path(f"size-{i}", index).unlink(missing_ok=True)

    def _crosses(
        self,
        block: nn.Module,
        copies: Sequence[nn.Module],
        layer: str,
        name: str,
        index: int,
        pairs: dict[str, Pair],
    ) -> list[CrossMoments]:
        """Return the joint moments of a layer's input, over all sizes together and then at every size."""
        if not self._needs_cross:
            return []
        each = zip(copies, self._pairs(pairs), strict=True)
        return _results([self._cross_sum(block, inside, layer, name, index, pair) for inside, pair in each], layer)

    def _pairs(self, pairs: dict[str, Pair]) -> list[Pair]:
        """Return the calibration samples on their way through the original model and that of every size."""
        last = pairs["calibration"]
        return [*(Pair(last.original, stream) for stream in self.followers), last]

    def _heads(self, swaps: dict[str, EmbeddingHost], pairs: dict[str, Pair]) -> dict[str, nn.Module]:
        for layer, weight in weights(self.job, [layer for layer in self.layers if layer.kind == HEAD]):
            bias = bias_of(self.job, layer.name)
            each = self._pairs(pairs) if self._needs_cross else []
            crosses = _results([self._head_sum(layer.name, pair) for pair in each], layer.name)
            held: dict[str, Tensor] = {}
            map_ = self._fitted(layer, weight, crosses, held)[-1]
            self._save_components(HEAD, held)
            if map_ is None:
                return {}
            module = host(map_.to(torch.float32), bias)
            if not self.partial.has(HEAD):
                own = None if bias is None else bias.to(map_.dtype)
                self.partial.save(
                    HEAD, stored_tensors(self.job, layer.name, module), [self._record(layer, map_, own, None)]
                )
            return {layer.name: module}
        return super()._heads(swaps, pairs)

    def _save_components(self, part: str, held: dict[str, Tensor]) -> None:
        write_tensors(self.partial.path(f"{FOLDER}-{part}"), held)


def _results(sums: Sequence[CrossSum], name: str) -> list[CrossMoments]:
    """Return the moments of what all sums together have seen, and then of each, which uses them up; none of none."""
    return [total.result(name) for total in (CrossSum.merged(sums), *sums)] if sums else []
