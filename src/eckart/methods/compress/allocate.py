"""From candidates to a plan: the allocations a recipe can name, each filling or solving the same table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from eckart.budget import (
    BYTES,
    DENSE,
    Candidates,
    Measure,
    Option,
    Together,
    knapsack,
    knapsack_together,
    least_cost_together,
    proportional,
    threshold,
    uniform,
    uniform_rank,
    weights_by_influence,
    weights_by_loss,
    zero_sum,
)
from eckart.budget.calibrate import calibrated, probe_option
from eckart.budget.latency import Latencies
from eckart.errors import EckartError
from eckart.methods.compress.costs import costed, member_bytes, stored
from eckart.methods.compress.fitting import fit_layer, loss_of, structure_name
from eckart.methods.compress.groups import (
    Group,
    SharedPlan,
    fit_group,
    group_candidates,
    groups_of,
    member_plans,
    with_code_bytes,
)
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import (
    LINEAR,
    NEURONS,
    Known,
    Layer,
    dense_bytes,
    errors_at,
    layer_candidates,
    merged,
    surveyed,
    type_of,
    unit_of,
    weights,
)
from eckart.methods.compress.limits import Limit
from eckart.methods.compress.narrowing import foreseen, narrowed_loss, narrower_sets
from eckart.methods.compress.outcome import LayerPlan, Plan, Spent
from eckart.methods.compress.probe import levels, probe, remembered
from eckart.progress import Progress

# ASVD truncates every layer to these shares of its numbers (the authors' code).
SENSITIVITY_LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True)
class Allocation:
    """What every layer becomes, and what it was chosen among.

    Attributes:
        chosen: the option of every layer, by name; of shared tensors the owner's part alone.
        table: the options there were, of layers in groups the dense one.
        fixed: what the rest of the model costs in the measure of the budget.
        shared: what groups of layers become together.
        narrowed: sets of layers that were chosen to become narrower together; each stands under the name of the layer
            that reads, and those that write stand nowhere.
    """

    chosen: dict[str, Option]
    table: list[Candidates]
    fixed: float
    shared: list[SharedPlan] = field(default_factory=list)
    narrowed: list[Layer] = field(default_factory=list)


def allocate(job: Job, layers: list[Layer], known: Known, *, predict: bool, progress: Progress) -> Allocation:
    """Choose an option for every layer, and one for every group of layers that share.

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
    # The errors of low-rank maps come together, those of other structures one by one: then only for what is chosen.
    compares = job.recipe.scores or allocation in ("knapsack", "calibrated")
    errors = compares or (predict and not (job.families or job.recipe.narrows))
    measure = job.request.limit.measure
    groups = groups_of(job, layers, known, _share(job, layers))
    grouped = {layer.name for group in groups for layer in group.members}
    alone = [layer for layer in layers if layer.name not in grouped]
    table = surveyed(job, alone, known, errors=errors, progress=lambda i: progress("plan", i, len(layers)))
    table += [group_candidates(job, known, group, errors=errors) for group in groups]
    latencies = Latencies(known.store.folder.parent, job.runner.device)
    sets = narrower_sets(job, layers, known) if job.recipe.together else []
    table, sets, fixed = costed(job, alone, table, latencies, progress, sets)
    grouped_table = zip(groups, table[len(alone) :], strict=True)
    table[len(alone) :] = [with_code_bytes(job, group, found) for group, found in grouped_table]
    together = _together(sets, measure)
    budget = budget_of(job, [layer.by(measure) for layer in table], fixed, job.request.limit, together)
    if budget >= sum(measure.of(layer.dense) for layer in table):  # nothing is gained by dropping what seems useless
        chosen = {layer.name: layer.dense for layer in table}
        if predict and job.recipe.coding is not None:
            chosen = _with_codes(job, alone, known, chosen, progress) | _foreseen_groups(job, known, groups, chosen)
        progress("plan", len(layers), len(layers))
        return _unfolded(job, groups, Allocation(chosen, table, fixed))
    if allocation == "sensitivity":
        table = _sensitivities(job, layers, known, table, progress)
    elif allocation == "calibrated":
        table = _calibrated(job, layers, known, table, progress)
    if job.recipe.together:
        chosen = knapsack_together([one.by(measure) for one in table], together, budget, measure)
        narrowed = [layer for layer, _ in sets if chosen[layer.name].structure == NEURONS]
        chosen = _with_codes(job, merged(layers, narrowed), known, chosen, progress) if predict else chosen
        progress("plan", len(layers), len(layers))
        return Allocation(chosen, table, fixed, narrowed=narrowed)
    chosen = choose(job, layers, known, table, budget)
    if predict and job.recipe.coding is not None:
        chosen = _with_codes(job, alone, known, chosen, progress) | _foreseen_groups(job, known, groups, chosen)
    elif predict and (job.recipe.scores or not errors):
        chosen = foreseen(job, alone, known, chosen) | _foreseen_groups(job, known, groups, chosen)
    progress("plan", len(layers), len(layers))
    return _unfolded(job, groups, Allocation(chosen, table, fixed))


def choose(
    job: Job, layers: list[Layer], known: Known, table: Sequence[Candidates], budget: float
) -> dict[str, Option]:
    """Return an option for every layer by the solver of the job's allocation.

    Args:
        job: the job.
        layers: its layers.
        known: their statistics, which some solvers weigh layers by.
        table: candidates with the losses or scores that the solver reads.
        budget: what all layers may cost together, in the measure of the job's limit.
    """
    measure = job.request.limit.measure
    solve: dict[str, Callable[[Sequence[Candidates], float, Measure], dict[str, Option]]] = {
        "uniform": uniform,
        "uniform-rank": uniform_rank,
        "threshold": threshold,
        "sensitivity": threshold,
        "calibrated": knapsack,
        "knapsack": knapsack,
        "log-loss": lambda table, budget, measure: proportional(
            table, budget, _log_loss_weights(job, layers, known, table, budget), measure
        ),
        "influence": lambda table, budget, measure: proportional(
            table, budget, _influence_weights(job, layers, known), measure
        ),
        "zero-sum": lambda table, budget, measure: zero_sum(table, budget, job.recipe.floor),
    }
    return solve[job.recipe.allocation]([layer.by(measure) for layer in table], budget, measure)


def _together(sets: Sequence[tuple[Layer, Candidates]], measure: Measure) -> list[Together]:
    """Return the sets that may become narrower together, as the knapsack knows them."""
    return [
        Together(layer.name, tuple(member.name for member in layer.members), found.by(measure).options[:-1])
        for layer, found in sets
    ]


def _unfolded(job: Job, groups: Sequence[Group], found: Allocation) -> Allocation:
    """Return an allocation to layers, given one in which every group stands under its owner's name."""
    chosen, table = dict(found.chosen), [one for one in found.table if one.name not in {g.name for g in groups}]
    shared = [SharedPlan(group, found.chosen[group.name]) for group in groups]
    for plan in shared:
        members = member_plans(job, plan.group, plan.option)
        chosen |= {name: option for name, (option, _) in members.items()}
        table += [alone for _, alone in members.values()]
    return Allocation(chosen, table, found.fixed, [plan for plan in shared if not is_dense(plan.option)])


def _foreseen_groups(job: Job, known: Known, groups: Sequence[Group], chosen: dict[str, Option]) -> dict[str, Option]:
    """Return the options of groups with the losses of their members as fitted."""
    out = {}
    for group in groups:
        option = chosen[group.name]
        if not is_dense(option):
            fits = fit_group(job, known, SharedPlan(group, option))
        elif job.recipe.coding is not None:
            parts = weights(job, list(group.members))
            fits = [fit_layer(job, known, layer, weight, option) for layer, weight in parts]
        else:
            continue
        out[group.name] = replace(option, loss=sum(fit.relative for fit in fits))
    return out


def _share(job: Job, layers: Sequence[Layer]) -> float:
    """Return the share of the layers' dense numbers, or bytes, that the budget leaves them together."""
    limit = job.request.limit
    if limit.measure == BYTES:
        total, dense = job.model.nbytes, sum(dense_bytes(job, layer.name, layer.shape, layer.bias) for layer in layers)
    else:
        total, dense = job.model.numel, sum(math.prod(layer.shape) + layer.bias for layer in layers)
    left, whole = limit.budget(total) - (total - dense), dense
    if limit.measure == BYTES and job.recipe.coding is not None:
        whole = sum(stored(job, layer, layer_candidates(job, layer, None).dense).nbytes for layer in layers)
    return min(left / whole, 1.0)


def _with_codes(
    job: Job, layers: list[Layer], known: Known, chosen: dict[str, Option], progress: Progress
) -> dict[str, Option]:
    """Return chosen options with the losses they have once their numbers are codes, if they become such."""
    if job.recipe.coding is None:
        return chosen
    out = dict(chosen)
    for i, layer in enumerate(layers):
        progress("plan", i, len(layers))
        option = chosen[layer.name]
        if layer.writers and not is_dense(option):
            loss = narrowed_loss(job, known, layer, option)
        else:
            parts = weights(job, list(layer.members))
            fits = (fit_layer(job, known, one, weight, option) for one, weight in parts)
            loss = sum(loss_of(known, fit) for fit in fits)
        out[layer.name] = replace(option, loss=loss)
    return out


def budget_of(
    job: Job, table: Sequence[Candidates], fixed: float, limit: Limit, together: Sequence[Together] = ()
) -> float:
    """Return what all candidate layers may cost together under a limit, beside what the rest of the model costs.

    Raises:
        EckartError: if the rest of the model alone, or with the cheapest options, exceeds what may remain.
    """
    total = fixed + sum(limit.measure.of(layer.dense) for layer in table)
    budget, least = limit.budget(total) * (1 + 1e-12) - fixed, least_cost_together(table, together, limit.measure)
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
            replace(o, loss=max(measured[layer.name, o.rank], 0.0))
            for o in options[layer.name]
            if (layer.name, o.rank) in measured
        ]
        out.append(replace(layer, options=(*scored, layer.dense)))
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


def _log_loss_weights(
    job: Job, layers: list[Layer], known: Known, table: Sequence[Candidates], budget: float
) -> dict[str, float]:
    """Return SVD-LLM v2's weights: every layer's error at the common share of the cost that meets the budget."""
    errors = errors_at(job, layers, known, uniform(table, budget, job.request.limit.measure))
    vectors = sum(batch.numel() for batch in job.calibration)
    losses = {name: math.sqrt(vectors * error) for name, error in errors.items()}
    return weights_by_loss(losses, {layer.name: type_of(layer) for layer in layers})


def _influence_weights(job: Job, layers: list[Layer], known: Known) -> dict[str, float]:
    """Return MoDeGPT's weights: one per block, for all its layers; embeddings and heads are as an average block."""
    count = len(job.parts.blocks)
    influence = [float(known.store.load("influence", i)["block"]["influence"]) for i in range(count)]
    by_block = weights_by_influence(influence, job.recipe.temperature)
    return {layer.name: by_block[layer.block] if 0 <= layer.block < count else 1.0 for layer in layers}


def plan_of(job: Job, layers: Sequence[Layer], allocation: Allocation) -> Plan:
    """Return the plan of an allocation, as it was chosen."""
    layers = merged(layers, allocation.narrowed)
    rows = [row for layer in layers for row in _rows(job, layer, allocation.chosen[layer.name])]
    return plan_from(job, rows, allocation)


def _rows(job: Job, layer: Layer, option: Option) -> list[LayerPlan]:
    """Return the row of a layer; of units and heads, a row for every layer around them, the error with their reader."""
    if not layer.writers:
        dense, option = layer.shape[0] * layer.shape[1] + layer.bias, stored(job, layer, option)
        numbers, nbytes = option.numbers, option.nbytes
        return [
            LayerPlan(
                layer.name, layer.kind, layer.shape, option.structure, option.rank, numbers, dense, nbytes, option.loss
            )
        ]
    rows = []
    for member in layer.members:
        numbers, dense = (member.narrow_numbers(units, layer) for units in (option.rank, layer.units))
        nbytes, structure = member_bytes(job, member, layer, option), structure_name(option, job.recipe.coding)
        rank = min(member.shape) if is_dense(option) else option.rank
        loss = option.loss if member.name == layer.name else 0.0
        rows.append(LayerPlan(member.name, LINEAR, member.shape, structure, rank, numbers, dense, nbytes, loss))
    return rows


def plan_from(job: Job, rows: Sequence[LayerPlan], allocation: Allocation) -> Plan:
    """Return the plan of given rows, with the whole model's figures."""
    saved = sum(row.dense_numbers - row.numbers for row in rows)
    before = sum(dense_bytes(job, row.name, row.shape, row.dense_numbers - math.prod(row.shape)) for row in rows)
    saved_bytes = before - sum(row.nbytes for row in rows)
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
        _spent(job, allocation, nbytes - saved_bytes),
    )


def _spent(job: Job, allocation: Allocation, nbytes: int) -> Spent | None:
    """Return what an allocation makes of a budget.

    Args:
        job: the job.
        allocation: the allocation.
        nbytes: bytes of the plan, in which numbers may be codes, and ranks less than was chosen.
    """
    limit = job.request.limit
    measure = limit.measure
    if limit.option == "keep":
        return None
    if measure == BYTES:
        return Spent(str(limit), measure.unit, job.model.nbytes, nbytes)
    before = allocation.fixed + sum(measure.of(layer.dense) for layer in allocation.table)
    after = allocation.fixed + sum(measure.of(option) for option in allocation.chosen.values())
    return Spent(str(limit), measure.unit, before * measure.scale, after * measure.scale)


def is_dense(option: Option) -> bool:
    """Tell whether an option leaves the layer alone."""
    return option.structure == DENSE
