"""Gathering the statistics that a recipe reads."""

from eckart.methods.compress.job import Job
from eckart.progress import Progress
from eckart.stats import Store, collect_gradients, collect_inputs


def collect(job: Job, store: Store, boundaries: Store, progress: Progress) -> None:
    """Gather the statistics that the recipe reads and the store does not have yet."""
    count, recipe = len(job.parts.blocks), job.recipe
    kinds = [f"gradients-{job.objective.name}"] if recipe.uses_gradients else []
    kinds += [f"weight-gradients-{job.objective.name}"] if recipe.uses_weight_gradients else []
    ends = store.has(f"ends-{job.objective.name}", 1)
    wants_gradients = bool(kinds) and not (ends and all(store.has(kind, count) for kind in kinds))
    has_inputs = store.has("inputs", count) and (job.parts.head is None or store.has("head-inputs", 1))
    has_inputs = has_inputs and store.has("influence", count)
    if wants_gradients or ((recipe.uses_inputs or recipe.allocation == "influence") and not has_inputs):
        collect_inputs(
            job.runner, job.calibration, store, boundaries=boundaries if wants_gradients else None, progress=progress
        )
    if wants_gradients:
        collect_gradients(
            job.runner,
            job.calibration,
            job.objective,
            store,
            boundaries,
            seed=job.request.seed,
            weights=recipe.uses_weight_gradients,
            progress=progress,
        )
    boundaries.clear()
