"""A whole model on fewer residual coordinates: one rotation for all layers, and an ordinary smaller model as result.

Beside the pipeline for single layers: the statistic is one forward pass, every tensor is rotated when it is written,
and nothing takes long enough to be resumed.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from eckart.atomic import write_json
from eckart.budget import BYTES
from eckart.errors import EckartError
from eckart.files.folder import copy_companions, open_model
from eckart.files.shards import Source, write_shards
from eckart.hosts import Blockwise, Call, Residual, anatomy, is_rms_norm, residual_of, rotated
from eckart.methods.compress.check import Expected, expectation
from eckart.methods.compress.job import Job
from eckart.methods.compress.measure import next_token_loss
from eckart.methods.compress.outcome import LayerPlan, Measured, Plan
from eckart.methods.compress.plain import Stored, plain_plan
from eckart.progress import Progress
from eckart.stats import MomentSum, advance, enter, hooked

# Largest relative difference between a block and its rotation, in float32, for a block that can be rotated.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Axis:
    """What is around the residual stream of a model.

    Attributes:
        width: d.
        blocks: the layers around it by block name.
        norm: name of the norm before the head.
    """

    width: int
    blocks: Mapping[str, Residual]
    norm: str


def residual_axis(job: Job) -> Axis:
    """Find the layers around the residual stream.

    Raises:
        EckartError: if the model is not a decoder that an orthogonal change of the stream's basis leaves alone.
    """
    model, parts = job.model.model, job.parts
    if parts.embedding is None or parts.head is None or not job.causal:
        raise EckartError(f"{type(model).__name__} has no plain embedding and head to be sliced; use another method")
    width = int(model.get_submodule(parts.embedding).embedding_dim)
    ends = {f"{parts.embedding}.weight", f"{parts.head}.weight"}
    rest = [name for name in job.model.outside(parts.blocks) if name not in ends]
    norms = [n for n in rest if is_rms_norm(model.get_submodule(n.rpartition(".")[0]), width)]
    if len(rest) != 1 or norms != rest or getattr(job.model.config, "head_dim", None) is None:
        raise EckartError(
            f"{type(model).__name__} cannot be sliced: that needs an RMSNorm and nothing else around the blocks, and "
            "heads of a size that config.json states; use another method"
        )
    stream = enter(job.runner, [job.calibration[0][:1]])
    blocks = {}
    for index, name in enumerate(parts.blocks):
        with job.runner.resident(name) as block:
            call, hidden = stream.calls[0][index], stream.hidden[0]
            blocks[name] = residual_of(block, partial(job.runner.run, block, hidden, call))
            _check_rotation(job.runner, name, block, blocks[name], hidden, call)
            advance(job.runner, block, index, stream)
    return Axis(width, blocks, norms[0].rpartition(".")[0])


@torch.no_grad()
def _check_rotation(
    runner: Blockwise, name: str, block: nn.Module, parts: Residual, hidden: Tensor, call: Call
) -> None:
    """Run a block and its copy in another basis: what comes out must be the same but for that basis."""
    width = hidden.shape[-1]
    random = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(random)[0].to(hidden.device)
    norms = {norm: cast(Tensor, block.get_submodule(norm).weight) for norm in parts.norms}
    turned = copy.deepcopy(block)
    for key, parameter in turned.named_parameters():
        parameter.copy_(rotated(key, parameter, parts, norms, basis))
    expected = runner.run(block, hidden, call).double() @ basis
    found = runner.run(turned, (hidden.double() @ basis).float(), call).double()
    if not float((found - expected).norm()) <= TOLERANCE * float(expected.norm()):
        raise EckartError(f"{name} is not the same in another basis of its residual stream, so it cannot be sliced")


@torch.no_grad()
def principal_axes(job: Job, axis: Axis, progress: Progress) -> Tensor:
    """Return the principal axes of what the norms let through, by falling variance, (d, d) float64.

    sum over all norms of  E[ z z^T ],    z = x sqrt(d) / |x|
    """
    total = MomentSum(axis.width, job.runner.device)
    stream = enter(job.runner, job.calibration)

    def see(_: str, x: Tensor) -> None:
        total.add(nn.functional.normalize(x.float(), dim=-1) * math.sqrt(axis.width))

    for index, name in enumerate(job.parts.blocks):
        progress("forward", index, len(job.parts.blocks))
        norms = {norm: job.model.model.get_submodule(f"{name}.{norm}") for norm in axis.blocks[name].norms}
        with job.runner.resident(name) as block, hooked(norms, see):
            advance(job.runner, block, index, stream)
    for x in stream.hidden:
        see(axis.norm, x)
    progress("forward", len(job.parts.blocks), len(job.parts.blocks))
    axes: Tensor = torch.linalg.eigh(total.result("the residual stream").second.double())[1]
    return axes.flip(1)


def sliced_plan(job: Job, axis: Axis) -> tuple[int, Plan]:
    """Return the largest width within the budget, and what every layer becomes.

    The width is a multiple of the number of heads, which transformers insists on.

    Raises:
        EckartError: if no width meets the budget.
    """
    limit, total = job.request.limit, job.model.numel
    whole = job.model.nbytes if limit.measure == BYTES else total
    budget, stored = math.floor(limit.budget(whole) + 1e-9), _stored(job)

    def cost(width: int) -> int:
        return sum(row.nbytes if limit.measure == BYTES else row.numbers for row in _rows(stored, axis, width))

    step = math.lcm(job.recipe.round_to, int(job.model.config.num_attention_heads))
    widths = [axis.width] if budget >= cost(axis.width) else range(step, axis.width, step)
    fitting = [w for w in widths if cost(w) <= budget]
    if not fitting:
        raise EckartError(
            f"{limit} of {limit.measure.show(whole)} cannot be met even with {step} of {axis.width} coordinates; ask "
            "for more, or use another method"
        )
    return fitting[-1], plain_plan(job, _rows(stored, axis, fitting[-1]))


def _stored(job: Job) -> Stored:
    return Stored.of(job, untied=job.recipe.untie and job.parts.tied)


def _rows(stored: Stored, axis: Axis, kept: int) -> list[LayerPlan]:
    """Return a row for every parameter; an untied head is one that the dense model lacks."""
    job = stored.job
    basis = torch.empty(axis.width, kept, dtype=torch.float64, device="meta")
    ends, out = {job.parts.embedding: "embedding", job.parts.head: "head"}, []
    for name, source in _names(job, kept != axis.width).items():
        shape = job.model.parameters[source]
        small = _changed(
            job, axis, basis, name, {n: torch.empty(s, device="meta") for n, s in _needed(job, axis, name)}
        )
        numbers, dense = small.numel(), math.prod(shape) if name == source else 0
        nbytes = stored.nbytes(name, small.shape, source)
        structure = stored.structure(name, "dense" if tuple(small.shape) == shape else "sliced")
        owner = name.removesuffix(".weight")
        kind, full = ends.get(owner, "linear"), (shape[0], shape[-1])
        out.append(LayerPlan(owner, kind, full, structure, min(*full, kept), numbers, dense, nbytes, 0.0))
    return out


def _names(job: Job, sliced: bool) -> dict[str, str]:
    """Return the tensors of the sliced model by name, each with the one of the original it is made of."""
    names = {name: name for name in job.model.parameters}
    if sliced and job.recipe.untie and job.parts.tied:
        names[f"{job.parts.head}.weight"] = f"{job.parts.embedding}.weight"
    return names


def _needed(job: Job, axis: Axis, name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of the original's tensors that a tensor of the sliced model is made of, its own first."""
    own = name if name in job.model.parameters else f"{job.parts.embedding}.weight"
    names, block = [own], _block_of(axis, name)
    if name == f"{job.parts.head}.weight":
        names.append(f"{axis.norm}.weight")
    elif block is not None:
        norm = axis.blocks[block].readers.get(name.removeprefix(f"{block}.").rpartition(".")[0])
        names += [] if norm is None else [f"{block}.{norm}.weight"]
    return [(one, job.model.parameters[one]) for one in names]


def _block_of(axis: Axis, name: str) -> str | None:
    return next((block for block in axis.blocks if name.startswith(f"{block}.")), None)


def _changed(job: Job, axis: Axis, basis: Tensor, name: str, read: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor of the sliced model, given those of the original that it is made of."""
    own, width, kept = next(iter(read.values())), axis.width, basis.shape[1]
    block = _block_of(axis, name)
    if block is not None:
        parts, inner = axis.blocks[block], name.removeprefix(f"{block}.")
        norms = {norm: read[key] for norm in parts.norms if (key := f"{block}.{norm}.weight") in read}
        return rotated(inner, own, parts, norms, basis)
    if name == f"{job.parts.embedding}.weight":
        return own.double() @ basis
    if name == f"{job.parts.head}.weight":
        return (own.double() * read[f"{axis.norm}.weight"].double()) @ basis
    if job.parts.tied and not job.recipe.untie:  # the nearest to Q^T diag(g) Q that a norm can hold
        return (basis.square().mT @ own.double()) * math.sqrt(width / kept)
    return basis.new_full((kept,), math.sqrt(width / kept))


def write_sliced(job: Job, axis: Axis, basis: Tensor, folder: Path, progress: Progress) -> None:
    """Write the sliced model as an ordinary folder, one shard of tensors at a time.

    Args:
        job: the job.
        axis: the layers around the residual stream.
        basis: Q (d, d').
        folder: an empty folder.
        progress: told of the stage "write".
    """
    kept, whole = basis.shape[1], basis.shape[1] == axis.width

    def made(name: str, dtype: torch.dtype) -> Tensor:
        read = {one: job.model.read(one).to(basis.device) for one, _ in _needed(job, axis, name)}
        return (next(iter(read.values())) if whole else _changed(job, axis, basis, name, read).to(dtype)).cpu()

    sources = {}
    for row, (name, source) in zip(_rows(Stored(job, {}), axis, kept), _names(job, not whole).items(), strict=True):
        sources[name] = Source(row.nbytes, partial(made, name, job.model.stored_dtype(source)))
    buffers = [name for name in job.model.outside(()) if name not in job.model.parameters]
    for name in buffers:
        size = math.prod(job.model.shape(name)) * job.model.stored_dtype(name).itemsize
        sources[name] = Source(size, partial(job.model.read, name))
    write_shards(folder, sources, lambda done: progress("write", done, len(sources)))
    config = json.loads((job.model.folder / "config.json").read_text(encoding="utf-8"))
    if not whole:
        config |= {"hidden_size": kept, "head_dim": int(job.model.config.head_dim)}
        config["tie_word_embeddings"] = job.parts.tied and not job.recipe.untie
    write_json(folder / "config.json", config)
    copy_companions(job.model.folder, folder)


def measured_folder(job: Job, folder: Path) -> tuple[Measured, Expected]:
    """Return the loss on held-out samples of the original and of a folder as written, and what that answers to a few,
    run block by block.
    """
    samples = job.samples
    if samples is None:
        raise AssertionError("slicing needs a text")
    small = open_model(folder)
    runner = Blockwise(small.model, anatomy(small.model), small.load, job.runner.device)
    (before, _), (after, hidden) = (_loss(one, samples.held_out) for one in (job.runner, runner))
    tokens = sum(batch.numel() for batch in samples.held_out)
    measured = Measured("loss", before, after, tokens, samples.disjoint)
    return measured, expectation(replace(job, runner=runner), samples.held_out, hidden, {})


def _loss(runner: Blockwise, batches: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Return the loss of a model, and the outputs of its last block."""
    stream = enter(runner, batches)
    for index, name in enumerate(runner.parts.blocks):
        with runner.resident(name) as block:
            advance(runner, block, index, stream)
    return next_token_loss(runner, batches, stream.hidden), stream.hidden
