"""Compressing a model folder into a smaller one, or only planning it: the doors that the command line goes through."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eckart.atomic import write_text
from eckart.budget import Candidates
from eckart.errors import EckartError
from eckart.files.card import inherited, model_card
from eckart.files.writing import LayerRecord, Partial, check_output, layer_entries, publish, write_folder
from eckart.methods.compress.allocate import allocate, plan_from, plan_of
from eckart.methods.compress.elastic import ElasticSweep, check_elastic, ordered, sizes_of
from eckart.methods.compress.job import Job, Request, open_job, statistics_store, trim_cache
from eckart.methods.compress.layers import Known, Layer, check_layers, layers_of, surveyed
from eckart.methods.compress.learned import Learning
from eckart.methods.compress.outcome import Measured, Outcome, Plan
from eckart.methods.compress.slicing import measured_folder, principal_axes, residual_axis, sliced_plan, write_sliced
from eckart.methods.compress.sweep import Sweep
from eckart.methods.compress.table import recipe_of, settings_of, summary_of
from eckart.progress import Progress, silent
from eckart.stats import Store, collect_gradients, collect_inputs


def compress(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "eckart",
    keep: float | None = None,
    calibration: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    elastic: bool = False,
    least: float = 0.5,
    cache: bool = True,
    progress: Progress = silent,
) -> Outcome:
    """Compress a Hugging Face model folder into a smaller one that `from_pretrained` loads.

    Memory holds one block, its statistics and the hidden states of the calibration samples; of methods that train the
    whole model, the whole model. A run that was stopped is continued by the same call and ends in the same bytes.

    Args:
        model: folder of a decoder or encoder with safetensors weights.
        out: folder to write; must not hold anything yet.
        method: one of `eckart.METHODS`.
        keep: share of the whole model's parameters that remains, in (0, 1]; by default 0.6, or 1 for methods that only
            store parameters in fewer bits, which take nothing else.
        calibration: text file; methods that use no data do without.
        samples: calibration samples; by default 128 windows for decoders (as many as they train on, for methods that
            train the whole model), 2,048 lines for encoders, or what the text has.
        length: tokens per sample, 256 by default.
        seed: seed of everything random.
        settings: settings of the method by name, typed.
        elastic: whether the folder also holds what `load` and `slice_folder` need to give every smaller size.
        least: the smallest of those, as a share like `keep`; only read if elastic.
        cache: whether to keep statistics for later runs, in $ECKART_CACHE or the user's cache folder.
        progress: called with (stage, steps done, steps in all).

    Raises:
        EckartError: for bad input of any kind, in one sentence; nothing is written then.
    """
    started, target = time.perf_counter(), Path(out)
    check_output(target)
    given = _request(model, method, keep, calibration, samples, length, seed, settings, least if elastic else None)
    return _run(_opened(given, progress), target, started, cache, progress)


def _run(job: Job, target: Path, started: float, cache: bool, progress: Progress) -> Outcome:
    """Do a job that began at `started`, and publish its outcome; what is finished is kept where it stops."""
    partial = Partial(target.absolute().with_name(f".{target.absolute().name}.eckart-{job.key[:8]}"))
    if job.recipe.sliced:
        return _sliced(job, target, partial, started, progress)
    layers = layers_of(job)
    check_layers(job, layers)
    try:
        partial.begin({"out": str(target), "settings": _described(job)})
        store = statistics_store(job, None if cache else partial.folder)
        planned, measured = _compressed(job, layers, store, partial, progress)
        seconds = time.perf_counter() - started
        outcome = Outcome(planned, target, measured, seconds, _peak_memory(), _described(job))
        _publish(job, partial, outcome, progress)
    except EckartError:
        if not partial.worth_keeping():
            partial.discard()
        raise
    partial.discard()
    if cache:
        trim_cache(store)
    return outcome


def _sliced(job: Job, target: Path, partial: Partial, started: float, progress: Progress) -> Outcome:
    """Write a sliced model: beside the target while it is made, then in one rename."""
    axis = residual_axis(job)
    kept, planned = sliced_plan(job, axis)
    partial.begin({"out": str(target), "settings": _described(job)})
    try:
        basis = principal_axes(job, axis, progress)[:, :kept]
        folder = partial.fresh_folder()
        write_sliced(job, axis, basis, folder, progress)
        measured = measured_folder(job, folder)
        seconds = time.perf_counter() - started
        outcome = Outcome(planned, target, measured, seconds, _peak_memory(), _described(job))
        for name, text in _texts(job, outcome).items():
            write_text(folder / name, text)
        publish(folder, target)
    finally:
        partial.discard()
    return outcome


def _compressed(
    job: Job, layers: list[Layer], store: Store, partial: Partial, progress: Progress
) -> tuple[Plan, Measured | None]:
    """Do all the work of a job up to its last finished part; return the plan as stored, and the loss."""
    _collect(job, store, Store(partial.folder / "boundaries"), progress)
    known = Known(job, store)
    measured: Measured | None
    if job.recipe.learner is not None:
        table, measured = Learning(job, known, layers, partial.folder, progress).run(partial)
    elif job.request.sizes:
        table = surveyed(job, layers, known, errors=True, progress=lambda i: progress("plan", i, len(layers)))
        measured = ElasticSweep(job, known, layers, ordered(job, layers, table), partial, progress).run()
    else:
        found = allocate(job, layers, known, predict=False, progress=progress)
        table, measured = found.table, Sweep(job, known, layers, found, partial, progress).run()
    return _as_stored(job, layers, table, partial.records()), measured


def _publish(job: Job, partial: Partial, outcome: Outcome, progress: Progress) -> None:
    """Write the finished parts as a model folder, and give it its name."""
    head = job.parts.head if job.parts.tied else None
    entries = layer_entries(partial.records(), job.parts.embedding, head)
    made_by, texts, sizes = _made_by(outcome), _texts(job, outcome), job.request.sizes
    folder = write_folder(partial, job.model, job.parts.blocks, entries, made_by, texts, progress, sizes)
    publish(folder, outcome.out)


def plan(
    model: str | Path,
    *,
    method: str = "eckart",
    keep: float | None = None,
    calibration: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    cache: bool = True,
    progress: Progress = silent,
) -> Plan:
    """Return what `compress` would make of every layer, with predicted losses; writes nothing but cached statistics.

    Args and errors are those of `compress`.
    """
    job = open_job(_request(model, method, keep, calibration, samples, length, seed, settings), progress)
    if job.recipe.sliced:
        return sliced_plan(job, residual_axis(job))[1]
    layers = layers_of(job)
    check_layers(job, layers)
    with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
        store = statistics_store(job, None if cache else Path(scratch))
        _collect(job, store, Store(Path(scratch) / "boundaries"), progress)
        known = Known(job, store)
        if job.recipe.learner is not None:
            chosen = Learning(job, known, layers, Path(scratch), progress).plan()
        else:
            chosen = allocate(job, layers, known, predict=True, progress=progress).chosen
    return plan_of(job, layers, chosen)


def _request(
    model: str | Path,
    method: str,
    keep: float | None,
    calibration: str | Path | None,
    samples: int | None,
    length: int | None,
    seed: int,
    settings: Mapping[str, Any] | None,
    least: float | None = None,
) -> Request:
    text = None if calibration is None else Path(calibration)
    share = recipe_of(method, settings).usual_keep if keep is None else keep
    sizes = () if least is None else sizes_of(share, least)
    return Request(Path(model), method, share, text, samples, length, seed, dict(settings or {}), sizes)


def _opened(request: Request, progress: Progress) -> Job:
    """Return the checked job of a request."""
    job = open_job(request, progress)
    if request.sizes:
        check_elastic(job)
    return job


def _collect(job: Job, store: Store, boundaries: Store, progress: Progress) -> None:
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


def _as_stored(job: Job, layers: list[Layer], table: list[Candidates], records: list[LayerRecord]) -> Plan:
    """Return the plan with the ranks, numbers and errors of what was written."""
    base = plan_of(job, layers, {c.name: c.dense for c in table})
    written = {record.name: record for record in records}
    rows = [
        replace(row, structure=r.structure, rank=r.rank, numbers=r.numbers, nbytes=r.nbytes, loss=r.loss)
        if (r := written.get(row.name)) is not None
        else row
        for row in base.layers
    ]
    return plan_from(job, rows)


def _described(job: Job) -> dict[str, Any]:
    """Return everything that decided the result, in plain values."""
    request = job.request
    defaults = {name: setting.default for name, setting in settings_of(request.method).items()}
    return {
        "model": request.model.name,
        "method": request.method,
        "keep": request.keep,
        "calibration": request.calibration.name if request.calibration else None,
        "samples": None if job.samples is None else sum(b.shape[0] for b in job.samples.batches),
        "tokens": None if job.samples is None else job.samples.tokens,
        "seed": request.seed,
        **({"sizes": list(request.sizes)} if request.sizes else {}),
        "settings": {**defaults, **request.settings},
        "model_hash": job.model_hash,
    }


def _made_by(outcome: Outcome) -> dict[str, Any]:
    plan = outcome.plan
    return {
        **outcome.settings,
        "parameters_before": plan.parameters_before,
        "parameters_after": plan.parameters_after,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "measured": _measured(outcome.measured),
    }


def _report(outcome: Outcome) -> str:
    """Return the outcome as JSON, without what differs between two runs of the same job."""
    kept = {k: v for k, v in outcome.as_dict().items() if k not in ("out", "seconds", "peak_memory")}
    return json.dumps(kept, indent=2) + "\n"


def _peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes (macOS counts in bytes, Linux in KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measured(measured: Measured | None) -> dict[str, Any] | None:
    return None if measured is None else asdict(measured)


def _texts(job: Job, outcome: Outcome) -> dict[str, str]:
    """Return the text files that every folder gets."""
    return {"README.md": _card(job, outcome), "eckart.json": _report(outcome)}


def _card(job: Job, outcome: Outcome) -> str:
    stated = {**_made_by(outcome), **inherited(job.model.folder), "method_summary": summary_of(job.request.method)}
    name, rows = str(outcome.settings["model"]), [asdict(row) for row in outcome.plan.layers]
    return model_card(name, outcome.settings, stated, rows)
