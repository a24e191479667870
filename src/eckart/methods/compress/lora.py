"""LoRA healing: low-rank updates of the factors of a compressed model, trained on its loss, one side after the other.

    W' = U V:    min over B, A of  loss(U + s B A, V),  then merged;    then the same of V;    s = alpha / rank

First the factors applied last, then those applied first, each a run of its own with the other side frozen, as SVD-LLM
(section 3.3) does; merged, so that the folder has the same tensors as before. The updates' rank 8, alpha 16, learning
rate 1e-4 and 2 epochs are the paper's; its dropout of 0.05 is left out. Factors that layers share stay as they are.

Memory holds the whole compressed model in float32, the gradients and moments of the updates. Each run keeps its state
on disk.
"""

import dataclasses
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from eckart.atomic import write_tensors
from eckart.files.folder import quiet, tensor_file
from eckart.files.loading import load
from eckart.files.writing import HEALED, Partial
from eckart.hosts.host import LowRankHost, PivotedHost
from eckart.methods.compress.check import Expected, expectation_of
from eckart.methods.compress.goal import Goal
from eckart.methods.compress.job import Job
from eckart.methods.compress.outcome import Measured
from eckart.methods.compress.updates import LowRankUpdate, changed, fold
from eckart.methods.training import Course, Step, train
from eckart.progress import Progress, later

ALPHA = 16.0
# Windows of text per step, or sentences with as many tokens.
BATCH = 4


def heal_by_lora(
    job: Job, partial: Partial, folder: Path, before: Measured, progress: Progress
) -> tuple[Measured, Expected]:
    """Train the factors of a compressed model and keep what they become as the part `HEALED`.

    Args:
        job: the job.
        partial: its finished parts.
        folder: the compressed model as a folder made of them.
        before: the loss before and after compression.
        progress: told of the stage "lora".

    Returns:
        The loss before compression and after healing, and what the healed model answers to a few held-out samples.

    Raises:
        EckartError: if the loss diverges; the last good state is kept.
    """
    with quiet():
        model = load(folder, dtype=torch.float32).to(job.runner.device).eval().requires_grad_(False)
    with nullcontext() if job.causal else job.runner.whole() as original:
        goal = Goal(job, original)
    samples = goal.samples(BATCH)
    steps = job.recipe.heal * (-(-len(samples) // BATCH) if isinstance(samples, Tensor) else len(samples))
    sides = sides_of(model, job.parts.blocks)

    def loss(step: Step) -> tuple[Tensor, Tensor]:
        found, _ = goal.losses(model, step.samples)
        return found, found

    for number, leaves in enumerate(sides):
        if not leaves:  # all are shared
            continue
        generator = torch.Generator().manual_seed(job.request.seed)
        for leaf in leaves.values():
            rank = job.recipe.heal_rank
            changed(leaf, "weight", LowRankUpdate(leaf.get_parameter("weight"), rank, ALPHA / rank, generator))
        train(
            nn.ModuleList(leaves.values()),
            samples,
            Course(steps, job.recipe.heal_rate, BATCH),
            loss,
            state=partial.path(f"lora-{number}"),
            seed=job.request.seed + number,
            stage="lora",
            progress=later(progress, number * steps, 2 * steps),
        )
        fold(leaves.values())
    healed = _rounded(folder, {name: leaf for leaves in sides for name, leaf in leaves.items()})
    write_tensors(partial.path(HEALED), healed)
    after = dataclasses.replace(before, after=goal.value(model))
    return after, expectation_of(job, goal.text.held_out, model)


def sides_of(model: nn.Module, blocks: tuple[str, ...]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the factors inside blocks that are applied last, and those applied first, by full name; none is shared."""
    last, first = dict[str, nn.Module](), dict[str, nn.Module]()
    for name, module in model.named_modules():
        if isinstance(module, LowRankHost):
            pair = "up", "down"
        elif isinstance(module, PivotedHost):
            pair = ("coefficients", "basis") if module.axis == "rows" else ("basis", "coefficients")
        else:
            continue
        if any(name.startswith(f"{block}.") for block in blocks):
            for side, inner in zip((last, first), pair, strict=True):
                side[f"{name}.{inner}"] = module.get_submodule(inner)
    uses = Counter(id(leaf.get_parameter("weight")) for leaf in (*last.values(), *first.values()))
    alone = [
        {n: leaf for n, leaf in side.items() if uses[id(leaf.get_parameter("weight"))] == 1} for side in (last, first)
    ]
    return alone[0], alone[1]


@torch.no_grad()
def _rounded(folder: Path, leaves: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Round factors to the dtypes they are stored in; return their weights by full name."""
    tensors, out = tensor_file(folder), {}
    for name, leaf in leaves.items():
        weight = leaf.get_parameter("weight")
        out[f"{name}.weight"] = weight.detach().to(tensors.dtype(f"{name}.weight"))
        weight.copy_(out[f"{name}.weight"])
    return out
