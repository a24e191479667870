"""Compressing by training the whole model: search, choice, tuning, and the same files as every other method writes.

Memory holds the whole model in float32, its gradients and the optimizer's moments (and the original, for a method that
distils from it). Both runs keep their state on disk (methods/training.py); what lies between them follows from it, so a
run that was stopped ends in the same bytes as one that was not.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from eckart.budget import Candidates, Option, uniform
from eckart.files.writing import TRAINING, LayerRecord, Partial
from eckart.fit import Coding, Metric, coded, error_of
from eckart.fit.subspace import SubspaceSum
from eckart.hosts import host, is_conv1d, map_of, offset_of, replace
from eckart.maps import LinearMap, storage
from eckart.methods.compress.allocate import Allocation, allocate, budget_of, choose, is_dense
from eckart.methods.compress.check import Expected, expectation_of
from eckart.methods.compress.fitting import fit_layer, loss_of, structure_name, tied_head
from eckart.methods.compress.goal import Goal
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import EMBEDDING, Known, Layer, layer_candidates, weights
from eckart.methods.compress.learner import LearnedLayer, Learner
from eckart.methods.compress.outcome import Measured
from eckart.methods.compress.recipe import LayerData
from eckart.methods.compress.sweep import compressed_embedding, rounded
from eckart.methods.training import Step, train
from eckart.progress import Progress
from eckart.stats import Moments, MomentSum, content_key, hooked

Maps = dict[str, tuple[LinearMap, Tensor | None, float]]  # map, bias and relative error by layer name

SEARCH, TUNE = TRAINING[:2]


class Learning:
    """A compression by training.

    Args:
        job: the job; its recipe has a learner.
        known: its statistics.
        layers: its layers.
        folder: where the states of its runs are kept.
        progress: told of the stages "train" and "tune".
    """

    def __init__(self, job: Job, known: Known, layers: list[Layer], folder: Path, progress: Progress) -> None:
        if job.recipe.learner is None:
            raise AssertionError("a recipe without a learner is not learned")
        self.job, self.known, self.folder, self.progress = job, known, folder, progress
        self.everything = layers
        self.layers = [layer for layer in layers if layer.kind != EMBEDDING]  # what can be trained
        self.learner: Learner = job.recipe.learner
        self.device = job.runner.device
        self.blocks = nn.ModuleList()

    def plan(self) -> Allocation:
        """Return what every layer would become; the search is done for it."""
        if self.learner.search is None:
            return allocate(self.job, self.everything, self.known, predict=True, progress=self.progress)
        with self.job.runner.whole() as model:
            self._enter(model)
            found, _, _ = self._searched(model, None)
        chosen = {name: dataclasses.replace(option, loss=0.0) for name, option in found.chosen.items()}
        return dataclasses.replace(found, chosen=chosen)

    def run(self, partial: Partial) -> tuple[Allocation, Measured, Expected]:
        """Do everything and write all blocks.

        Returns:
            What was chosen, the loss before and after, and what the model answers to a few held-out samples.
        """
        maps: Maps = {}
        searches = self.learner.search is not None
        if not searches:
            found = allocate(self.job, self.everything, self.known, predict=False, progress=self.progress)
            maps = self._closed_form(found.chosen)
        with self.job.runner.whole() as model:
            self._enter(model)
            before = self.goal.value(model) if self.job.causal else 0.0
            if searches:
                found, maps, ends = self._searched(model, partial)
            else:
                ends = self._compress_embedding(model, found.chosen, partial)
            originals = {name: map_of(model.get_submodule(name)).dense() for name in maps if self.learner.departure}
            dense = {name: replace(model, name, host(map_, bias)) for name, (map_, bias, _) in maps.items()}
            if maps and self.learner.tuning is not None and not self.learner.holds:
                hosts = [model.get_submodule(name).requires_grad_(True) for name in maps]
                self._tune(model, hosts, originals)
            if self.job.recipe.coding is not None:
                maps = self._coded(model, maps, self.job.recipe.coding)
                for name, (map_, bias, _) in maps.items():
                    last = replace(model, name, host(map_, bias))
                    dense.setdefault(name, last)
            losses = {name: loss for name, (_, _, loss) in maps.items()}
            self._write(model, found.chosen, losses, partial)
            after, expected = self.goal.value(model), expectation_of(self.job, self.goal.text.held_out, model)
            for name, module in {**dense, **ends}.items():  # the skeleton is what everybody else goes by
                replace(model, name, module)
        return found, self.goal.measured(before, after), expected

    @torch.no_grad()
    def _coded(self, model: nn.Module, maps: Maps, coding: Coding) -> Maps:
        """Return the maps of all layers as trained, dense ones among them, with their numbers as codes.

        Relative errors are those of the maps before training, if there were any, and of the rounding.
        """
        out, moments = Maps(), self._moments(model)
        for layer in self.layers:
            name, module = layer.name, model.get_submodule(layer.name)
            trained = map_of(module).apply(Tensor.detach)
            matrix, before = trained.dense(), maps[name][2] if name in maps else 0.0
            seen = self.job.recipe.metric(LayerData(matrix, moments[name]))
            codes = coded(trained, matrix, seen, coding, self.job.weight_dtype(name)).to(torch.float32)
            out[name] = (codes, offset_of(module), before + _relative(matrix, codes, seen))
        return out

    def _enter(self, model: nn.Module) -> None:
        self.blocks = nn.ModuleList(model.get_submodule(name) for name in self.job.parts.blocks)
        self.goal = Goal(self.job, model, features=bool(self.learner.features))

    def _compress_embedding(
        self, model: nn.Module, chosen: dict[str, Option], partial: Partial
    ) -> dict[str, nn.Module]:
        """Put the embedding as it is stored, and a head tied to it, in the model, frozen; return what was there."""
        inside = [one for one in self.everything if self.job.recipe.coding or not is_dense(chosen[one.name])]
        found = compressed_embedding(self.job, self.known, inside, chosen, partial)
        ends: dict[str, nn.Module] = dict(found)
        for embedding in found.values():
            ends |= tied_head(self.job, embedding)
        return {name: replace(model, name, module.requires_grad_(False)) for name, module in ends.items()}

    def _closed_form(self, chosen: dict[str, Option]) -> Maps:
        """Return the recipe's own maps of the layers that do not stay dense, in numbers that can be trained."""
        out, plain = {}, dataclasses.replace(self.job, recipe=dataclasses.replace(self.job.recipe, bits=0))
        for layer, weight in weights(self.job, [layer for layer in self.layers if not is_dense(chosen[layer.name])]):
            key = f"{layer.name}.bias"
            bias = self.job.model.read(key).to(weight) if layer.bias else None
            fit = fit_layer(plain, self.known, layer, weight, chosen[layer.name], bias=bias, dtype=torch.float32)
            out[layer.name] = (fit.map, fit.bias, loss_of(self.known, fit))
        return out

    def _searched(self, model: nn.Module, partial: Partial | None) -> tuple[Allocation, Maps, dict[str, nn.Module]]:
        """Train the layers, choose their ranks, leave them dense in the model.

        The embedding, if it takes part, gets the share that all layers together have, behind the search.

        Args:
            model: the whole model.
            partial: where the embedding is kept; None for a plan, for which nothing is compressed or tuned.

        Returns:
            What was chosen, the maps of linear layers that do not stay dense, and the ends that were replaced.
        """
        job, learner, course = self.job, self.learner, self.learner.search
        dense = [layer_candidates(job, layer, None) for layer in self.everything]
        full = sum(layer.dense.numbers for layer in dense)
        fixed = job.model.numel - full
        budget = budget_of(job, dense, fixed, job.request.limit)
        if course is None or budget >= full:
            whole = {layer.name: layer.dense for layer in dense}
            ends = {} if partial is None else self._compress_embedding(model, whole, partial)
            return Allocation(whole, dense, fixed), {}, ends
        tables = [one for one, layer in zip(dense, self.everything, strict=True) if layer.kind == EMBEDDING]
        chosen = uniform(tables, budget / full * sum(table.dense.numbers for table in tables)) if tables else {}
        budget -= sum(option.numbers for option in chosen.values())
        full -= sum(table.dense.numbers for table in tables)
        originals: dict[str, nn.Module] = {}
        layers: dict[str, LearnedLayer] = {}
        generator = torch.Generator().manual_seed(job.request.seed)
        moments = self._moments(model)
        for layer, weight in weights(job, self.layers):
            bias = offset_of(model.get_submodule(layer.name))
            seen = job.recipe.metric(LayerData(weight, moments[layer.name]))
            module = learner.layer(weight, bias, budget / full, generator, seen).to(job.runner.device)
            layers[layer.name], originals[layer.name] = module, replace(model, layer.name, module)

        def loss(step: Step) -> tuple[Tensor, Tensor]:
            learner.prepare(layers, step)
            task, features = self.goal.losses(model, step.samples)
            return learner.objective(task, layers, step) + learner.features * features, task

        self._trainable(list(layers.values()))
        train(
            self.blocks, self.goal.samples(course.batch), course, loss,
            state=self._state(), seed=job.request.seed, after=lambda step: learner.after(layers, step),
            apart=learner.apart, progress=self.progress,
        )  # fmt: skip
        table = [self._scored(layer, layers[layer.name]) for layer in self.layers]
        chosen |= choose(job, self.layers, self.known, table, budget)
        ends = {} if partial is None else self._compress_embedding(model, chosen, partial)
        if partial is not None and learner.holds and learner.tuning is not None:
            for layer in self.layers:
                option = chosen[layer.name]
                layers[layer.name].hold(min(layer.shape) if is_dense(option) else option.rank)
            self._tune(model, list(layers.values()), {})
        with torch.no_grad():
            for name, original in originals.items():
                _put(replace(model, name, original), original)
            return Allocation(chosen, [*tables, *table], fixed), self._maps(model, layers, chosen), ends

    def _scored(self, layer: Layer, learned: LearnedLayer) -> Candidates:
        """Return the ranks a layer may get with the scores the search ended with."""
        scores = learned.scores().double()
        return layer_candidates(self.job, layer, torch.cat((scores, scores.new_zeros(1))))

    def _state(self) -> Path:
        """Return where the search's state is: with the statistics if every budget shares it."""
        if not self.learner.any_size:
            return self.folder / f"{SEARCH}.safetensors"
        request, search = self.job.request, dataclasses.replace(self.learner, tuning=None)
        settings = sorted((name, repr(value)) for name, value in request.settings.items())
        # the learner as well: another version may have other defaults
        key = content_key((request.method, repr(settings), repr(search)), [])
        return self.known.store.path(f"search-{key[:16]}", 0)

    def _maps(self, model: nn.Module, layers: dict[str, LearnedLayer], chosen: dict[str, Option]) -> Maps:
        """Return what the layers become that were chosen not to stay dense, dense in the model until then."""
        moments, maps = self._moments(model), Maps()
        shared = self._shared_outputs(model, chosen) if self.learner.by_sequence else {}
        recipe = self.job.recipe
        for layer in self.layers:
            option, learned = chosen[layer.name], layers[layer.name]
            if is_dense(option):
                continue
            matrix = learned.matrix()
            seen = recipe.metric(LayerData(matrix, moments[layer.name]))
            bias = None if learned.bias is None else learned.bias.detach().clone()
            outputs = shared.get(layer.name)
            factors = outputs.factors(matrix) if outputs else learned.factors(option.rank, seen)
            built = storage(recipe.storage).build(factors).to(torch.float32)
            maps[layer.name] = (built, bias, _relative(matrix, built, seen))
        return maps

    def _shared_outputs(self, model: nn.Module, chosen: dict[str, Option]) -> dict[str, SubspaceSum]:
        """Return what the leading outputs of all samples have in common, for layers that do not stay dense."""
        inside = {layer.name: layer for layer in self.layers if not is_dense(chosen[layer.name])}
        modules = {name: model.get_submodule(name) for name in inside}
        sums = {name: SubspaceSum(layer.shape[0], chosen[name].rank, self.device) for name, layer in inside.items()}
        with torch.no_grad(), hooked(modules, lambda name, x: sums[name].add(map_of(modules[name])(x))):
            self.goal.read(model)
        return sums

    def _moments(self, model: nn.Module) -> dict[str, Moments]:
        """Return the moments of all layers' inputs in the model as it is."""
        sums = {layer.name: MomentSum(layer.shape[1], self.device) for layer in self.layers}
        modules = {layer.name: model.get_submodule(layer.name) for layer in self.layers}
        with torch.no_grad(), hooked(modules, lambda name, x: sums[name].add(x)):
            self.goal.read(model)
        return {name: total.result(name) for name, total in sums.items()}

    def _trainable(self, layers: Sequence[nn.Module]) -> None:
        """Mark what is trained: everything in the blocks, or what a layer itself says is."""
        for parameter in self.blocks.parameters():
            kept = parameter.requires_grad and any(parameter is p for layer in layers for p in layer.parameters())
            parameter.requires_grad_(self.learner.everything or kept)

    def _tune(self, model: nn.Module, layers: Sequence[nn.Module], originals: dict[str, Tensor]) -> None:
        """Train the structure that was chosen.

        Args:
            model: the whole model.
            layers: its layers; of their parameters those that require gradients are trained.
            originals: matrices that some of them should stay close to, by name.
        """
        course, learner = self.learner.tuning, self.learner
        if course is None:
            raise AssertionError("a learner without a tuning does not tune")
        self._trainable(layers)

        def loss(step: Step) -> tuple[Tensor, Tensor]:
            task, features = self.goal.losses(model, step.samples)
            return task + learner.features * features + learner.departure * departure(), task

        def departure() -> Tensor | float:
            moved: list[Tensor] = []
            for name, weight in originals.items():
                change = map_of(model.get_submodule(name)).dense() - weight
                moved.append(change.square().sum() / weight.square().sum())
            return torch.stack(moved).mean() if moved else 0.0

        state = self.folder / f"{TUNE}.safetensors"
        train(
            self.blocks, self.goal.samples(course.batch), course, loss,
            state=state, seed=self.job.request.seed, stage="tune", progress=self.progress,
        )  # fmt: skip

    def _write(self, model: nn.Module, chosen: dict[str, Option], losses: dict[str, float], partial: Partial) -> None:
        """Round everything to the dtypes it is stored in, and write the blocks."""
        for index, name in enumerate(self.job.parts.blocks):
            inside = {layer.name: layer for layer in self.layers if layer.block == index}
            tensors = rounded(self.job, name, model.get_submodule(name), inside)
            records = []
            for layer in inside.values():
                if layer.name in losses:
                    module, dtype = model.get_submodule(layer.name), self.job.weight_dtype(layer.name)
                    bias, option = offset_of(module), chosen[layer.name]
                    records.append(
                        LayerRecord.of(
                            layer.name, map_of(module).to(dtype), bias, losses[layer.name],
                            planned=(structure_name(option, self.job.recipe.coding), option.rank),
                        )
                    )  # fmt: skip
            partial.save_block(index, tensors, records)


def _relative(matrix: Tensor, map_: LinearMap, seen: Metric) -> float:
    """Return the error of a map as a share of that of the zero map."""
    whole = error_of(matrix, torch.zeros_like(matrix), seen)
    return error_of(matrix, map_.dense(), seen) / whole if whole > 0 else 0.0


def _put(learned: nn.Module, original: nn.Module) -> None:
    """Write what was learned of a layer into the dense layer it came from."""
    if not isinstance(learned, LearnedLayer):
        raise AssertionError("only layers under search are put back")
    matrix = learned.matrix().detach()
    cast(Tensor, original.weight).copy_(matrix.mT if is_conv1d(original) else matrix)
    if learned.bias is not None:
        cast(Tensor, original.bias).copy_(learned.bias)
