"""From candidates to a plan: the allocations a recipe can name, each filling or solving the same table."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from eckart.budget import DENSE, Candidates, Option, knapsack, smallest_numbers, threshold, uniform, uniform_rank
from eckart.budget.calibrate import calibrated, probe_option
from eckart.errors import EckartError
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import Known, Layer, foreseen, surveyed, unit_of
from eckart.methods.compress.outcome import LayerPlan, Plan
from eckart.methods.compress.probe import levels, probe, remembered
from eckart.progress import Progress

# ASVD truncates every layer to these shares of its numbers (the authors' code).
SENSITIVITY_LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def allocate(
    job: Job, layers: list[Layer], known: Known, *, predict: bool, progress: Progress
) -> tuple[dict[str, Option], list[Candidates]]:
    """Choose an option for every layer.

    Args:
        job: the job.
        layers: its layers.
        known: their statistics.
        predict: whether predicted losses are wanted even if the allocation does without.
        progress: told of the stages "plan" and "probe".

    Raises:
        EckartError: if the budget cannot be met.
    """
    allocation = job.recipe.allocation
    # The errors of low-rank maps come together, those of other families one by one: then only for what is chosen.
    compares = allocation in ("threshold", "knapsack", "calibrated")
    errors = compares or (predict and not job.recipe.families)
    table = surveyed(job, layers, known, errors=errors, progress=lambda i: progress("plan", i, len(layers)))
    budget = room(job, table)
    if budget >= sum(layer.dense.numbers for layer in table):  # nothing is gained by dropping even what seems useless
        progress("plan", len(layers), len(layers))
        return {layer.name: layer.dense for layer in table}, table
    if allocation == "sensitivity":
        table = _sensitivities(job, layers, known, table, progress)
    elif allocation == "calibrated":
        table = _calibrated(job, layers, known, table, progress)
    chosen = choose(job, table, budget)
    if predict and not errors:
        chosen = foreseen(job, layers, known, chosen)
    progress("plan", len(layers), len(layers))
    return chosen, table


def choose(job: Job, table: Sequence[Candidates], budget: int) -> dict[str, Option]:
    """Return an option for every layer by the solver of the job's allocation.

    Args:
        job: the job.
        table: candidates with the losses or scores that the solver reads.
        budget: numbers all layers may store together.
    """
    solve: dict[str, Callable[[Sequence[Candidates], int], dict[str, Option]]] = {
        "uniform": uniform,
        "uniform-rank": uniform_rank,
        "threshold": threshold,
        "sensitivity": threshold,
        "calibrated": knapsack,
        "knapsack": knapsack,
    }
    return solve[job.recipe.allocation](table, budget)


def room(job: Job, table: Sequence[Candidates]) -> int:
    """Return the numbers that all candidate layers may store together.

    Raises:
        EckartError: if the other parameters alone, or with the cheapest options, exceed what may remain.
    """
    total = job.model.numel
    fixed = total - sum(layer.dense.numbers for layer in table)
    budget = math.floor(job.request.keep * total + 1e-9) - fixed
    least = smallest_numbers(table)
    if budget < least:
        hint = "" if job.recipe.embeddings else ", or let embeddings be compressed as well with --set embeddings=true"
        raise EckartError(
            f"keep {job.request.keep:g} of {total:,} parameters cannot be met: {fixed:,} lie outside the layers "
            f"compressed, and those take {least:,} at rank 1; ask for more than {(fixed + least) / total:.3f}{hint}"
        )
    return budget


def _sensitivities(
    job: Job, layers: list[Layer], known: Known, table: list[Candidates], progress: Progress
) -> list[Candidates]:
    """Return candidates at ASVD's levels with the measured increase of the loss as score."""
    options = {c.name: levels(c, SENSITIVITY_LEVELS) for c in table}
    count = len(job.parts.blocks)
    measured = remembered(
        job,
        known,
        options,
        lambda: probe(job, known, layers, options, observed=job.causal, progress=lambda i: progress("probe", i, count)),
    )
    out = []
    for layer in table:
        scored = [
            dataclasses.replace(o, loss=max(measured[layer.name, o.rank], 0.0))
            for o in options[layer.name]
            if (layer.name, o.rank) in measured
        ]
        out.append(dataclasses.replace(layer, options=(*scored, layer.dense)))
    return out


def _calibrated(
    job: Job, layers: list[Layer], known: Known, table: list[Candidates], progress: Progress
) -> list[Candidates]:
    """Return candidates whose losses meet the divergence measured at one option per layer (LEMS)."""
    options = {c.name: [o] if (o := probe_option(c)) is not None else [] for c in table}
    count = len(job.parts.blocks)
    measured = remembered(
        job,
        known,
        options,
        lambda: probe(job, known, layers, options, observed=False, progress=lambda i: progress("probe", i, count)),
    )
    depth = {layer.name: layer.block for layer in layers if 0 <= layer.block < count}
    return calibrated(
        table, {name: value for (name, _), value in measured.items()}, depth=depth, gamma=job.recipe.gamma
    )


def plan_of(job: Job, layers: Sequence[Layer], chosen: dict[str, Option], table: Sequence[Candidates]) -> Plan:
    """Return the plan that a choice of options makes."""
    dense = {c.name: c.dense for c in table}
    rows = [
        LayerPlan(
            layer.name,
            layer.kind,
            layer.shape,
            chosen[layer.name].structure,
            chosen[layer.name].rank,
            chosen[layer.name].numbers,
            dense[layer.name].numbers,
            chosen[layer.name].nbytes,
            chosen[layer.name].loss,
        )
        for layer in layers
    ]
    return plan_from(job, rows, dense)


def plan_from(job: Job, rows: Sequence[LayerPlan], dense: dict[str, Option]) -> Plan:
    """Return the plan of given rows, with the whole model's figures."""
    total = job.model.numel
    sizes = (math.prod(s) * job.model.stored_dtype(name).itemsize for name, s in job.model.parameters.items())
    saved = sum(dense[row.name].numbers - row.numbers for row in rows)
    saved_bytes = sum(dense[row.name].nbytes - row.nbytes for row in rows)
    nbytes = sum(sizes)
    return Plan(
        job.request.method,
        job.request.keep,
        total,
        total - saved,
        nbytes,
        nbytes - saved_bytes,
        unit_of(job),
        tuple(rows),
    )


def is_dense(option: Option) -> bool:
    """Tell whether an option leaves the layer alone."""
    return option.structure == DENSE
