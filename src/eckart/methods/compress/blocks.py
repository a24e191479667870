"""A whole model with fewer blocks: which to remove, what becomes of those that stay, and an ordinary smaller model.

Beside the pipeline for single layers, as slicing is. Plain removal holds one block in memory at a time; fusion trains
blocks and holds them all. Its runs keep their state on disk, and what lies between them follows from it.
"""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.atomic import write_json
from eckart.budget import BYTES
from eckart.errors import EckartError
from eckart.files.folder import copy_companions, with_config
from eckart.files.shards import Source, write_shards
from eckart.hosts import Blockwise, anatomy
from eckart.methods.compress.check import Expected, expectation
from eckart.methods.compress.fusing import graft, group_around
from eckart.methods.compress.job import Job
from eckart.methods.compress.outcome import LayerPlan, Measured, Plan
from eckart.methods.compress.plain import Stored, plain_plan
from eckart.methods.compress.removal import Removal
from eckart.methods.compress.sweep import measured, rounded
from eckart.progress import Progress, later
from eckart.stats import Stream, advance, enter

REMOVED = "removed"
# Largest relative difference between a block's output where it was and where it is put.
TOLERANCE = 1e-3
# The name that transformers has for the number of blocks, whatever a model calls it.
DEPTH = "num_hidden_layers"


@dataclass(slots=True)
class Stack:
    """The blocks of a model that stay.

    Attributes:
        job: the job.
        kept: their indices in the original, ascending.
        held: blocks in memory by index, changed or to be; the others are read when it is their turn.
    """

    job: Job
    kept: list[int]
    held: dict[int, nn.Module] = field(default_factory=dict)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Give a block by its index in the original."""
        if index in self.held:
            yield self.held[index]
        else:
            with self.job.runner.resident(self.job.parts.blocks[index]) as block:
                yield block

    def hold(self) -> None:
        """Keep copies of all blocks in memory."""
        for index in self.kept:
            with self.job.runner.resident(self.job.parts.blocks[index]) as block:
                self.held[index] = copy.deepcopy(block)

    def after(self, blocks: Sequence[int], stream: Stream) -> Stream:
        """Return a stream that has passed some of the blocks; the given one stays where it is."""
        moved = Stream(list(stream.hidden), stream.calls)
        for index in blocks:
            with self.block(index) as block:
                advance(self.job.runner, block, index, moved)
        return moved


def influence_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return 1 - E cos(x, y) over all tokens of two lists of hidden states, (b, t, d) per batch."""
    cosines = [
        nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).flatten().double()
        for x, y in zip(before, after, strict=True)
    ]
    return 1 - float(torch.cat(cosines).mean())


def block_influences(stack: Stack, stream: Stream, progress: Progress) -> dict[int, float]:
    """Return how far each block turns its input, by block."""
    found = {}
    for index in stack.kept:
        progress("forward", index, len(stack.kept))
        moved = stack.after([index], stream)
        found[index] = influence_of(stream.hidden, moved.hidden)
        stream = moved
    progress("forward", len(stack.kept), len(stack.kept))
    return found


def macro_influences(stack: Stack, stream: Stream) -> dict[int, float]:
    """Return how far each block turns the last block's output by being there, by block."""
    whole, found = stack.after(stack.kept, stream), {}
    for position, index in enumerate(stack.kept):
        without = stack.after(stack.kept[position + 1 :], stream)
        found[index] = influence_of(whole.hidden, without.hidden)
        stream = stack.after([index], stream)
    return found


def shortened(job: Job, folder: Path, progress: Progress, *, last: bool = True) -> Stack:
    """Remove blocks until the budget is met.

    Args:
        job: the job; its recipe has a removal.
        folder: where the states of its runs are kept.
        progress: told of the stage "forward" or "fuse".
        last: whether blocks are trained after the last removal too, which a plan has no need of.

    Raises:
        EckartError: if no number of blocks meets the budget, or the model cannot do without its blocks.
    """
    stack, needed = Stack(job, list(range(len(job.parts.blocks)))), _removals(job)
    if not needed:
        return stack
    if _removal(job).macro:
        return _one_by_one(stack, needed, folder, progress, last)
    found = block_influences(stack, enter(job.runner, job.calibration), progress)
    for index in sorted(found, key=lambda index: found[index]):
        if not fits(job, stack.kept):
            stack.kept.remove(index)
    check_order(stack)
    return stack


def _one_by_one(stack: Stack, needed: int, folder: Path, progress: Progress, last: bool) -> Stack:
    """Remove the block of least macro influence until the budget is met, and train those around it each time."""
    job, removal = stack.job, _removal(stack.job)
    _check_alike(job)
    stack.hold()
    stream, steps, done = enter(job.runner, job.calibration), removal.epochs * len(job.calibration), 0
    while not fits(job, stack.kept):
        before, total = min(done, needed - 1) * steps, needed * steps
        progress("fuse", before, total)
        found = macro_influences(stack, stream)
        removed = min(found, key=lambda index: found[index])
        staying = [index for index in stack.kept if index != removed]
        check_order(Stack(job, staying))
        if removal.epochs and (last or not fits(job, staying)):
            group = group_around(stack.kept, removed, removal.group)
            inputs = stack.after(stack.kept[: stack.kept.index(group[0])], stream)
            graft(
                job.runner,
                {index: stack.held[index] for index in group},
                removed,
                inputs,
                removal,
                state=folder / f"fuse-{done:03d}.safetensors",
                seed=job.request.seed,
                progress=later(progress, before, total),
            )
        stack.kept = staying
        del stack.held[removed]
        done += 1
    progress("fuse", needed * steps, needed * steps)
    return stack


def _removal(job: Job) -> Removal:
    if job.recipe.removal is None:
        raise AssertionError("a recipe without a removal removes no blocks")
    return job.recipe.removal


def cost(stored: Stored, name: str) -> int:
    """Return what a parameter counts under the job's budget."""
    job, shape = stored.job, stored.job.model.parameters[name]
    return stored.nbytes(name, shape) if job.request.limit.measure == BYTES else math.prod(shape)


def fits(job: Job, kept: Sequence[int]) -> bool:
    """Tell whether the blocks at these indices, with all that is around the blocks, meet the budget."""
    stored = Stored.of(job)
    costs = {name: cost(stored, name) for name in job.model.parameters}
    staying = [name for name in costs if (at := block_of(job, name)) is None or at in kept]
    budget = math.floor(job.request.limit.budget(sum(costs.values())) + 1e-9)
    return sum(costs[name] for name in staying) <= budget


def _removals(job: Job) -> int:
    """Return how many blocks have to go if the first do.

    Raises:
        EckartError: if the budget is less than one block and all around the blocks.
    """
    count = len(job.parts.blocks)
    if not all(fits(job, [index]) for index in range(count)):  # whichever would be the last to stay
        limit = job.request.limit
        whole = job.model.nbytes if limit.measure == BYTES else job.model.numel
        raise EckartError(
            f"{limit} of {limit.measure.show(whole)} cannot be met even with one of {count} blocks; ask for more, or "
            "use another method"
        )
    return next((n for n in range(count) if fits(job, range(n, count))), count - 1)


def block_of(job: Job, name: str) -> int | None:
    """Return the index of the block that a tensor lies in, None for one around the blocks."""
    return next((i for i, block in enumerate(job.parts.blocks) if name.startswith(f"{block}.")), None)


def _check_alike(job: Job) -> None:
    """Raise an `EckartError` if blocks differ in what they hold: then one cannot be grafted onto another."""
    held: list[dict[str, tuple[int, ...]]] = [{} for _ in job.parts.blocks]
    for name, shape in job.model.parameters.items():
        index = block_of(job, name)
        if index is not None:
            held[index][name.removeprefix(f"{job.parts.blocks[index]}.")] = shape
    if any(other != held[0] for other in held):
        raise EckartError(
            f"the blocks of {type(job.model.model).__name__} in {job.model.folder} differ in their layers, so one "
            "cannot be fused into another; use shortgpt"
        )


def short_config(job: Job, kept: Sequence[int]) -> dict[str, Any]:
    """Return config.json of a model with some of the blocks: its depth, and every list that has an entry per block.

    Raises:
        EckartError: if the configuration does not say how many blocks there are.
    """
    raw: dict[str, Any] = json.loads((job.model.folder / "config.json").read_text(encoding="utf-8"))
    config, count = job.model.config, len(job.parts.blocks)
    if len(kept) == count:
        return raw
    if getattr(config, DEPTH, None) != count:
        raise EckartError(
            f"{job.model.folder / 'config.json'} does not say that there are {count} blocks, so none can be removed; "
            "use another method"
        )
    # lists that transformers works out from the depth are written down, for the depth will be another
    lists = {key: value for key, value in config.to_dict().items() if "layer" in key} | raw
    for key, value in lists.items():
        if isinstance(value, list) and len(value) == count and "token" not in key and key != "architectures":
            raw[key] = [value[index] for index in kept]
    return raw | {config.attribute_map.get(DEPTH, DEPTH): len(kept)}


@torch.no_grad()
def check_order(stack: Stack) -> None:
    """Check that the smaller model, made from its own configuration, runs every block that stays as the original does.

    Raises:
        EckartError: if a block depends on where it stands.
    """
    job = stack.job
    model = with_config(job.model, short_config(job, stack.kept))
    parts = anatomy(model)
    origin = dict(zip(parts.blocks, (job.parts.blocks[index] for index in stack.kept), strict=False))

    def before(name: str) -> str:
        block = next((new for new in origin if f"{name}.".startswith(f"{new}.")), None)
        return name if block is None else origin[block] + name.removeprefix(block)

    def load(module: nn.Module, name: str) -> None:
        job.model.load(module, before(name))

    shapes = {before(name): tuple(p.shape) for name, p in model.named_parameters()}
    same = {name: shape for name, shape in job.model.parameters.items() if block_of(job, name) in (None, *stack.kept)}
    if shapes == same:
        runner, sample = Blockwise(model, parts, load, job.runner.device), [job.calibration[0][:1]]
        original, short = enter(job.runner, sample), enter(runner, sample)
        x, differences = original.hidden[0], [0.0]
        for new, old in enumerate(stack.kept):
            with job.runner.resident(job.parts.blocks[old]) as block, runner.resident(parts.blocks[new]) as moved:
                wanted = job.runner.run(block, x, original.calls[0][old])
                found = runner.run(moved, x, short.calls[0][new])
            differences.append(float((found - wanted).norm() / wanted.norm()))
            x = wanted
        if max(differences) <= TOLERANCE:
            return
    raise EckartError(
        f"what a block of {type(model).__name__} is depends on how many come before it, so none can be removed; use "
        "another method"
    )


def short_plan(job: Job, kept: Sequence[int]) -> Plan:
    """Return what becomes of every parameter."""
    ends, rows, stored = {job.parts.embedding: "embedding", job.parts.head: "head"}, [], Stored.of(job)
    for name, shape in job.model.parameters.items():
        index, owner, dense = block_of(job, name), name.removesuffix(".weight"), math.prod(shape)
        gone = index is not None and index not in kept
        full = (shape[0], shape[-1])
        numbers, rank = (0, 0) if gone else (dense, min(full))
        nbytes = 0 if gone else stored.nbytes(name, shape)
        kind, structure = ends.get(owner, "linear"), REMOVED if gone else stored.structure(name, "dense")
        rows.append(LayerPlan(owner, kind, full, structure, rank, numbers, dense, nbytes, 0.0))
    return plain_plan(job, rows)


def write_short(stack: Stack, folder: Path, progress: Progress) -> None:
    """Write the smaller model as an ordinary folder; blocks held in memory are rounded to the dtypes of the original.

    Args:
        stack: its blocks.
        folder: an empty folder.
        progress: told of the stage "write".
    """
    job, sources = stack.job, dict[str, Source]()
    prefix = job.parts.blocks[0].rpartition(".")[0]
    changed: dict[str, Tensor] = {}
    for held, block in stack.held.items():
        changed |= rounded(job, job.parts.blocks[held], block, ())
    for name in job.model.outside(()):
        index = block_of(job, name)
        if index is not None and index not in stack.kept:
            continue
        new = name
        if index is not None:
            new = f"{prefix}.{stack.kept.index(index)}{name.removeprefix(job.parts.blocks[index])}"
        size = math.prod(job.model.shape(name)) * job.model.stored_dtype(name).itemsize
        sources[new] = Source(size, partial(changed.__getitem__ if name in changed else job.model.read, name))
    write_shards(folder, sources, lambda done: progress("write", done, len(sources)))
    write_json(folder / "config.json", short_config(job, stack.kept))
    copy_companions(job.model.folder, folder)


def measured_stack(stack: Stack) -> tuple[Measured, Expected]:
    """Return the loss on held-out samples of the original and with the blocks that stay, and what these answer."""
    job = stack.job
    if job.samples is None:
        raise AssertionError("removing blocks needs a text")
    stream = enter(job.runner, job.samples.held_out)
    before = Stack(job, list(range(len(job.parts.blocks)))).after(range(len(job.parts.blocks)), stream)
    after = stack.after(stack.kept, stream)
    found = measured(job, before.hidden, after.hidden, {})
    if found is None:
        raise AssertionError("a job with samples is measured")
    return found, expectation(job, job.samples.held_out, after.hidden, {})
