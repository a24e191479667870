"""From candidates to a plan: the allocations a recipe can name, each filling or solving the same table."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eckart.budget import (
    DENSE,
    Candidates,
    Measure,
    Option,
    knapsack,
    least_cost,
    threshold,
    uniform,
    uniform_rank,
)
from eckart.budget.calibrate import calibrated, probe_option
from eckart.budget.latency import Latencies
from eckart.errors import EckartError
from eckart.methods.compress.costs import costed
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import Known, Layer, foreseen, surveyed, unit_of
from eckart.methods.compress.outcome import LayerPlan, Plan, Spent
from eckart.methods.compress.probe import levels, probe, remembered
from eckart.progress import Progress

# ASVD truncates every layer to these shares of its numbers (the authors' code).
SENSITIVITY_LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was chosen among what.

    Attributes:
        chosen: an option for every layer.
        table: the candidates.
        fixed: what the rest of the model costs in the measure of the budget.
    """

    chosen: dict[str, Option]
    table: list[Candidates]
    fixed: float


def allocate(job: Job, layers: list[Layer], known: Known, *, predict: bool, progress: Progress) -> Allocation:
    """Choose an option for every layer.

    Args:
        job: the job.
        layers: its layers.
        known: their statistics.
        predict: whether predicted losses are wanted even if the allocation does without.
        progress: told of the stages "plan", "latency" and "probe".

    Raises:
        EckartError: if the budget cannot be met.
    """
    allocation = job.recipe.allocation
    # The errors of low-rank maps come together, those of other families one by one: then only for what is chosen.
    compares = allocation in ("threshold", "knapsack", "calibrated")
    errors = compares or (predict and not job.recipe.families)
    table = surveyed(job, layers, known, errors=errors, progress=lambda i: progress("plan", i, len(layers)))
    measure = job.request.limit.measure
    latencies = Latencies(known.store.folder.parent, job.runner.device)
    table, fixed = costed(job, layers, table, latencies, progress)
    budget = _budget(job, [layer.by(measure) for layer in table], fixed)
    if budget >= sum(measure.of(layer.dense) for layer in table):  # nothing is gained by dropping what seems useless
        progress("plan", len(layers), len(layers))
        return Allocation({layer.name: layer.dense for layer in table}, table, fixed)
    if allocation == "sensitivity":
        table = _sensitivities(job, layers, known, table, progress)
    elif allocation == "calibrated":
        table = _calibrated(job, layers, known, table, progress)
    solve: dict[str, Callable[[Sequence[Candidates], float, Measure], dict[str, Option]]] = {
        "uniform": uniform,
        "uniform-rank": uniform_rank,
        "threshold": threshold,
        "sensitivity": threshold,
        "calibrated": knapsack,
        "knapsack": knapsack,
    }
    chosen = solve[allocation]([layer.by(measure) for layer in table], budget, measure)
    if predict and not errors:
        chosen = foreseen(job, layers, known, chosen)
    progress("plan", len(layers), len(layers))
    return Allocation(chosen, table, fixed)


def _budget(job: Job, table: Sequence[Candidates], fixed: float) -> float:
    """Return what all candidate layers may cost together.

    Raises:
        EckartError: if the rest of the model alone, or with the cheapest options, exceeds what may remain.
    """
    limit = job.request.limit
    total = fixed + sum(limit.measure.of(layer.dense) for layer in table)
    budget, least = limit.budget(total) * (1 + 1e-12) - fixed, least_cost(table, limit.measure)
    if budget < least:
        hint = "" if job.recipe.embeddings else ", or let embeddings be compressed as well with --set embeddings=true"
        raise EckartError(
            f"{limit} of {limit.measure.show(total)} cannot be met: {limit.measure.show(fixed)} lie outside the layers "
            f"compressed, and those take {limit.measure.show(least)} at their smallest; ask for more than "
            f"{limit.needed(fixed + least, total)}{hint}"
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


def plan_of(job: Job, layers: Sequence[Layer], allocation: Allocation) -> Plan:
    """Return the plan of an allocation, as it was chosen."""
    dense, chosen = {c.name: c.dense for c in allocation.table}, allocation.chosen
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
    return plan_from(job, rows, allocation)


def plan_from(job: Job, rows: Sequence[LayerPlan], allocation: Allocation) -> Plan:
    """Return the plan of given rows, with the whole model's figures."""
    dense = {c.name: c.dense for c in allocation.table}
    saved = sum(dense[row.name].numbers - row.numbers for row in rows)
    saved_bytes = sum(dense[row.name].nbytes - row.nbytes for row in rows)
    total, nbytes = job.model.numel, job.model.nbytes
    return Plan(
        job.request.method,
        job.request.limit.amount if job.request.limit.option == "keep" else None,
        total,
        total - saved,
        nbytes,
        nbytes - saved_bytes,
        unit_of(job),
        tuple(rows),
        _spent(job, allocation),
    )


def _spent(job: Job, allocation: Allocation) -> Spent | None:
    limit = job.request.limit
    measure = limit.measure
    if limit.option == "keep":
        return None
    before = allocation.fixed + sum(measure.of(layer.dense) for layer in allocation.table)
    after = allocation.fixed + sum(measure.of(option) for option in allocation.chosen.values())
    return Spent(str(limit), measure.unit, before * measure.scale, after * measure.scale)


def is_dense(option: Option) -> bool:
    """Tell whether an option leaves the layer alone."""
    return option.structure == DENSE
