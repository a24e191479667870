"""The pass that compresses: block by block, each layer fitted on what it sees, each finished block written at once.

Two streams run side by side: the samples in the original model and in the model compressed so far. A finished block's
file is the commit point; a run that was stopped goes on behind the last one, with the hidden states stored beside it,
and gives the same bytes as one that was not.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from eckart.budget import Option
from eckart.files.writing import LayerRecord, Partial
from eckart.fit import Fit
from eckart.hosts import Call, EmbeddingHost, map_of, offset_of, replace
from eckart.maps import Quantized
from eckart.methods.compress.allocate import Allocation, is_dense
from eckart.methods.compress.check import Expected, expectation
from eckart.methods.compress.fitting import (
    fit_layer,
    loss_of,
    loss_of_map,
    running,
    running_embedding,
    structure_name,
    tied_head,
)
from eckart.methods.compress.groups import GroupFits, without_borrowed
from eckart.methods.compress.heal import heal
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import EMBEDDING, HEAD, Known, Layer, bias_of, merged, stays_apart, weights
from eckart.methods.compress.measure import divergence, next_token_loss
from eckart.methods.compress.narrowing import fit_narrowed
from eckart.methods.compress.outcome import Measured
from eckart.methods.compress.rounding import LearnedRounding
from eckart.progress import Progress
from eckart.stats import (
    CrossMoments,
    CrossSum,
    StopBlockError,
    Store,
    Stream,
    advance,
    enter,
    head_inputs,
    hooked,
    input_groups,
    load_hidden,
    save_hidden,
)

# Token ids (b, t) drawn at random that stand in for held-out samples where there is no text.
DRAWN = (2, 16)


@dataclass(slots=True)
class Pair:
    """Samples on their way through the original and the compressed model.

    Attributes:
        original: their stream in the original model.
        compressed: their stream in the compressed model.
    """

    original: Stream
    compressed: Stream


class Sweep:
    """One compressing pass over a model.

    Args:
        job: the job.
        known: its statistics.
        layers: its layers.
        found: what each becomes.
        partial: where finished parts are written.
        progress: told of the stage "compress".
    """

    def __init__(
        self,
        job: Job,
        known: Known,
        layers: Sequence[Layer],
        found: Allocation,
        partial: Partial,
        progress: Progress,
    ) -> None:
        self.job, self.known, self.chosen, self.partial, self.progress = job, known, found.chosen, partial, progress
        layers = merged(layers, found.narrowed)
        if job.recipe.coding is not None:  # dense layers become codes, one by one
            layers, self.chosen = stays_apart(layers, found.chosen)
        self.layers = [layer for layer in layers if job.recipe.coding or not is_dense(self.chosen[layer.name])]
        self.groups = GroupFits(job, known, found.shared, partial.folder)
        self.streams = Store(partial.folder)
        recipe = job.recipe
        self.learns = recipe.sequential or recipe.update or recipe.heals_blocks
        self.held_out = [_drawn(job)] if job.samples is None else job.samples.held_out

    def run(self) -> tuple[Measured | None, Expected]:
        """Compress everything not yet finished; return the loss before and after, if there is a text, and what the
        compressed model answers to a few samples.
        """
        count = len(self.job.parts.blocks)
        swaps = self._embedding()
        embedding = next(iter(swaps.values()), None)
        done = self.partial.blocks_done()
        pairs = self._enter(embedding, done)
        for index in range(done, count):
            self.progress("compress", index, count)
            self._block(index, pairs)
        self.progress("compress", count, count)
        heads = self._heads(swaps, pairs)
        expected = expectation(self.job, self.held_out, pairs["held-out"].compressed.hidden, heads)
        held_out = pairs["held-out"]
        return measured(self.job, held_out.original.hidden, held_out.compressed.hidden, heads), expected

    def _embedding(self) -> dict[str, EmbeddingHost]:
        """Compress the token embedding, if planned; return it by name."""
        return compressed_embedding(self.job, self.known, self.layers, self.chosen, self.partial)

    def _enter(self, embedding: nn.Module | None, done: int) -> dict[str, Pair]:
        """Return the streams at the first unfinished block: of the held-out samples, of the calibration if needed."""
        wanted = {"calibration": self.job.calibration} if self.learns else {}
        wanted["held-out"] = self.held_out
        pairs = {}
        for name, batches in wanted.items():
            original = enter(self.job.runner, batches)
            compressed = original if embedding is None else enter(self.job.runner, batches, embedding)
            pairs[name] = Pair(original, Stream(list(compressed.hidden), original.calls))
            if done:
                device = self.job.runner.device
                pairs[name].original.hidden[:] = load_hidden(self.streams, done, device, f"{name}-original")
                pairs[name].compressed.hidden[:] = load_hidden(self.streams, done, device, f"{name}-compressed")
        return pairs

    def _block(self, index: int, pairs: dict[str, Pair]) -> None:
        """Compress one block, move all streams past it, and commit it."""
        job, name = self.job, self.job.parts.blocks[index]
        inside = {layer.name: layer for layer in self.layers if layer.block == index}
        with job.runner.resident(name) as block:
            compressed, records = self._compressed_block(block, index, pairs, inside)
            targets = self._advance_originals(block, index, pairs)
        # before the first compressed layer the error is zero, and healing would only decay the weights
        if job.recipe.heals_blocks and any(layer.block <= index for layer in self.layers):
            self._heal(compressed, index, pairs["calibration"], targets)
        if job.recipe.scale_rank:
            records = self._learned(name, compressed, inside, records)
        self._commit(index, compressed, inside, records, pairs)

    def _compressed_block(
        self, block: nn.Module, index: int, pairs: dict[str, Pair], inside: dict[str, Layer]
    ) -> tuple[nn.Module, list[LayerRecord]]:
        """Return a copy of a block with its layers compressed; what was known of them is let go of."""
        job, name = self.job, self.job.parts.blocks[index]
        records: list[LayerRecord] = []
        compressed = copy.deepcopy(block)
        for group in self._groups(block, name, index, pairs, inside):
            cross = self._cross(block, compressed, group[0], name, index, pairs) if self._needs_cross else None
            for layer in [inside[member] for member in group if inside[member].writers]:
                records += self._narrow(layer, compressed, name, cross)
            for layer, weight in weights(self.known.job, [inside[m] for m in group if not inside[m].writers]):
                inner = layer.name.removeprefix(f"{name}.")
                bias = offset_of(block.get_submodule(inner))
                fit = self.groups.fit(layer, bias) or fit_layer(
                    job, self.known, layer, weight, self.chosen[layer.name], bias=bias, cross=cross
                )
                replace(compressed, inner, self._module(fit, weight))
                planned, taken = _planned(self.job, self.chosen[layer.name]), self.groups.taken(layer, fit)
                loss = loss_of(self.known, fit)
                records.append(LayerRecord.of(layer.name, fit.map, fit.bias, loss, planned=planned, shared=taken))
        self.known.forget()
        return compressed, records

    def _commit(
        self,
        index: int,
        compressed: nn.Module,
        inside: dict[str, Layer],
        records: list[LayerRecord],
        pairs: dict[str, Pair],
    ) -> None:
        """Move the compressed streams past a finished block and write it."""
        job, name = self.job, self.job.parts.blocks[index]
        tensors = rounded(job, name, compressed, [member.name for layer in inside.values() for member in layer.members])
        for pair in pairs.values():
            advance(job.runner, compressed, index, pair.compressed)
        for key, pair in pairs.items():
            save_hidden(self.streams, index + 1, pair.original.hidden, f"{key}-original")
            save_hidden(self.streams, index + 1, pair.compressed.hidden, f"{key}-compressed")
        self.partial.save_block(index, without_borrowed(tensors, records), records)
        for key in pairs:
            for stream in ("original", "compressed"):
                self.streams.path(f"{key}-{stream}", index).unlink(missing_ok=True)

    def _narrow(self, layer: Layer, compressed: nn.Module, name: str, cross: CrossMoments | None) -> list[LayerRecord]:
        """Put fewer hidden units, or channels per head, in a compressed block; return the records of its layers."""
        option, records = self.chosen[layer.name], list[LayerRecord]()
        for part in fit_narrowed(self.job, self.known, layer, option, cross=cross):
            replace(compressed, part.layer.name.removeprefix(f"{name}."), running(part.fit))
            loss, planned = loss_of(self.known, part.fit), _planned(self.job, self.chosen[layer.name])
            records.append(
                LayerRecord.of(part.layer.name, part.fit.map, part.fit.bias, loss, planned=planned, neurons=part.entry)
            )
        return records

    @property
    def _needs_cross(self) -> bool:
        return self.job.recipe.sequential or self.job.recipe.update

    def _groups(
        self, block: nn.Module, name: str, index: int, pairs: dict[str, Pair], inside: dict[str, Layer]
    ) -> list[list[str]]:
        """Return the layers to compress, in execution order where that matters, those with one input together."""
        if not inside:
            return []
        if not self._needs_cross:
            return [list(inside)]
        groups = input_groups(self.job.runner, block, name, index, pairs["calibration"].original)
        kept = [[member for member in group if member in inside] for group in groups]
        return [group for group in kept if group]

    def _cross(
        self, block: nn.Module, compressed: nn.Module, layer: str, name: str, index: int, pairs: dict[str, Pair]
    ) -> CrossMoments:
        """Return the moments of a layer's input in the compressed model, jointly with the original's if needed."""
        return self._cross_sum(block, compressed, layer, name, index, pairs["calibration"]).result(layer)

    @torch.no_grad()
    def _cross_sum(
        self, block: nn.Module, compressed: nn.Module, layer: str, name: str, index: int, pair: Pair
    ) -> CrossSum:
        inner = layer.removeprefix(f"{name}.")
        total: CrossSum | None = None
        for i, call in enumerate(pair.original.calls):
            shifted = _input_of(self.job, compressed, inner, pair.compressed.hidden[i], call[index])
            total = total or CrossSum(shifted.shape[-1], shifted.device, paired=self._paired)
            x = _input_of(self.job, block, inner, pair.original.hidden[i], call[index]) if self._paired else None
            total.add(shifted, x)
        if total is None:
            raise AssertionError("a job with calibration samples has batches")
        return total

    @property
    def _paired(self) -> bool:
        """Whether fits read the inputs in both models; SVD-LLM's update only reads those in the compressed one."""
        return self.job.recipe.sequential

    def _advance_originals(self, block: nn.Module, index: int, pairs: dict[str, Pair]) -> list[Tensor]:
        """Move the original streams past the block; return the calibration samples' outputs, for healing."""
        for pair in pairs.values():
            advance(self.job.runner, block, index, pair.original)
        return pairs["calibration"].original.hidden if "calibration" in pairs else []

    def _heal(self, compressed: nn.Module, index: int, pair: Pair, targets: list[Tensor]) -> None:
        recipe, count = self.job.recipe, len(self.job.parts.blocks)
        calls = [call[index] for call in pair.original.calls]
        heal(
            self.job.runner,
            compressed,
            calls,
            pair.compressed.hidden,
            targets,
            fixed=self.groups.shared_parameters(compressed, index),
            epochs=recipe.heal,
            rate=recipe.heal_rate,
            seed=self.job.request.seed + index,
            progress=lambda epoch: self.progress("compress", index * recipe.heal + epoch, count * recipe.heal),
            parameters=[p for m in compressed.modules() if isinstance(m, LearnedRounding) for p in m.parameters()],
        )

    def _module(self, fit: Fit, weight: Tensor) -> nn.Module:
        """Return a fitted layer of a block as a module that runs, and learns its codes if the recipe says so."""
        module, recipe = running(fit), self.job.recipe
        if not recipe.scale_rank or not isinstance(fit.map, Quantized):
            return module
        generator = torch.Generator().manual_seed(self.job.request.seed)
        return LearnedRounding(weight, cast(Quantized, map_of(module)), offset_of(module), recipe.scale_rank, generator)

    def _learned(
        self, name: str, compressed: nn.Module, inside: dict[str, Layer], records: list[LayerRecord]
    ) -> list[LayerRecord]:
        """Put the codes a block has learned in place of what learned them; return the records with their losses."""
        losses = {}
        for layer, weight in weights(self.job, list(inside.values())):
            inner = layer.name.removeprefix(f"{name}.")
            module = cast(LearnedRounding, compressed.get_submodule(inner))
            map_ = module.result(self.job.weight_dtype(layer.name))
            losses[layer.name] = loss_of_map(self.job, self.known, layer, weight, map_)
            replace(compressed, inner, running(Fit(map_, module.bias, 0.0, 0.0)))
        return [dataclasses.replace(record, loss=losses[record.name]) for record in records]

    def _heads(self, swaps: dict[str, EmbeddingHost], pairs: dict[str, Pair]) -> dict[str, nn.Module]:
        """Return the modules that replace the head: tied to a compressed embedding, or compressed itself."""
        for embedding in swaps.values():
            tied = tied_head(self.job, embedding)
            if tied:
                return tied
        for layer, weight in weights(self.job, [layer for layer in self.layers if layer.kind == HEAD]):
            bias, name = bias_of(self.job, layer.name), layer.name
            cross = self._head_sum(name, pairs["calibration"]).result(name) if self._needs_cross else None
            fit = fit_layer(self.job, self.known, layer, weight, self.chosen[layer.name], bias=bias, cross=cross)
            module = running(fit)
            if not self.partial.has(HEAD):
                loss = loss_of(self.known, fit)
                record = LayerRecord.of(
                    layer.name, fit.map, fit.bias, loss, planned=_planned(self.job, self.chosen[layer.name])
                )
                self.partial.save(HEAD, stored_tensors(self.job, layer.name, module), [record])
            return {layer.name: module}
        return {}

    def _head_sum(self, name: str, pair: Pair) -> CrossSum:
        runner = self.job.runner
        originals = list(head_inputs(runner, name, pair.original.hidden)) if self._paired else itertools.repeat(None)
        total: CrossSum | None = None
        for shifted, x in zip(head_inputs(runner, name, pair.compressed.hidden), originals, strict=False):
            total = total or CrossSum(shifted.shape[-1], runner.device, paired=self._paired)
            total.add(shifted, x)
        if total is None:
            raise AssertionError("a job with calibration samples has batches")
        return total


def compressed_embedding(
    job: Job, known: Known, layers: Sequence[Layer], chosen: Mapping[str, Option], partial: Partial
) -> dict[str, EmbeddingHost]:
    """Compress the token embedding, if it is among the layers, and keep it as a finished part; return it by name.

    Args:
        job: the job.
        known: its statistics.
        layers: those that are compressed.
        chosen: what each becomes.
        partial: where finished parts are written.
    """
    for layer, weight in weights(job, [layer for layer in layers if layer.kind == EMBEDDING]):
        fit = fit_layer(job, known, layer, weight, chosen[layer.name])
        module = running_embedding(job, fit)
        if not partial.has(EMBEDDING):
            record = LayerRecord.of(
                layer.name, fit.map, fit.bias, loss_of(known, fit), kind=EMBEDDING,
                padding_idx=module.padding_idx, planned=_planned(job, chosen[layer.name]),
            )  # fmt: skip
            partial.save(EMBEDDING, stored_tensors(job, layer.name, module), [record])
        return {layer.name: module}
    return {}


def _planned(job: Job, option: Option) -> tuple[str, int]:
    """Return what a layer becomes, as plans say it, and at which rank."""
    return structure_name(option, job.recipe.coding), option.rank


def stored_tensors(job: Job, name: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a fitted module's tensors by full name, in the dtype its weight was stored in."""
    dtype = job.weight_dtype(name)
    state = module.state_dict(prefix=f"{name}.")
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}


def measured(
    job: Job, original: Sequence[Tensor], compressed: Sequence[Tensor], heads: Mapping[str, nn.Module]
) -> Measured | None:
    """Return the loss before and after, if there is a text.

    Args:
        job: the job.
        original: the original's last hidden states of the held-out samples, (b, t, d) per batch.
        compressed: those of the compressed model.
        heads: modules in place of the model's head.
    """
    samples = job.samples
    if samples is None:
        return None
    runner, batches = job.runner, samples.held_out
    tokens = sum(batch.numel() for batch in batches)
    if job.causal:
        before, after = next_token_loss(runner, batches, original), next_token_loss(runner, batches, compressed, heads)
    else:
        before, after = 0.0, divergence(runner, batches, original, compressed, heads)
    return Measured(job.measure, before, after, tokens, samples.disjoint)


@torch.no_grad()
def rounded(job: Job, name: str, compressed: nn.Module, inside: Collection[str]) -> dict[str, Tensor]:
    """Round a block's numbers to the dtypes they are stored in; return them by full name.

    Args:
        job: the job.
        name: of the block.
        compressed: the block, changed in place.
        inside: names of its compressed layers, whose numbers are stored in the dtype of the weight they replace.
    """
    out = {}
    for key, tensor in compressed.state_dict(keep_vars=True).items():
        full = f"{name}.{key}"
        owner = next((layer for layer in inside if full.startswith(f"{layer}.")), None)
        dtype = job.weight_dtype(owner) if owner else job.model.stored_dtype(full)
        stored = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach().clone()
        if tensor.is_floating_point():
            tensor.copy_(stored)
        out[full] = stored
    return out


def _drawn(job: Job) -> Tensor:
    """Return token ids drawn at random."""
    vocabulary = int(getattr(job.model.config, "vocab_size", None) or 1)
    return torch.randint(0, vocabulary, DRAWN, generator=torch.Generator().manual_seed(job.request.seed))


def _input_of(job: Job, block: nn.Module, inner: str, hidden: Tensor, call: Call) -> Tensor:
    """Return what a layer of a block is given, without running what comes after it."""
    seen: list[Tensor] = []

    def see(_: str, x: Tensor) -> None:
        seen.append(x)
        raise StopBlockError

    with hooked({inner: block.get_submodule(inner)}, see), contextlib.suppress(StopBlockError):
        job.runner.run(block, hidden, call)
    return seen[0]
