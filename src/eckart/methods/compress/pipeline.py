"""Compressing a model folder into a smaller one, or only planning it: the doors that the command line goes through."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eckart.atomic import check_output, write_text
from eckart.budget import Candidates
from eckart.errors import EckartError
from eckart.files.card import inherited, model_card
from eckart.files.writing import HEALED, LayerRecord, Partial, layer_entries, publish, write_folder
from eckart.hosts.memory import peak_memory
from eckart.methods.compress.allocate import Allocation, allocate, plan_from, plan_of
from eckart.methods.compress.blocks import measured_stack, short_plan, shortened, write_short
from eckart.methods.compress.check import BrokenOutputError, Expected, check_reload
from eckart.methods.compress.collect import collect
from eckart.methods.compress.corrections import corrected
from eckart.methods.compress.elastic import ElasticSweep, check_elastic, chosen_of, elastic_plan, ordered, sizes_of
from eckart.methods.compress.job import Job, Request, open_job, statistics_store, trim_cache
from eckart.methods.compress.layers import Known, Layer, check_layers, layers_of, surveyed
from eckart.methods.compress.learned import Learning
from eckart.methods.compress.lora import heal_by_lora
from eckart.methods.compress.outcome import Checked, Measured, Outcome, Plan
from eckart.methods.compress.plain import SMALL, coded_model
from eckart.methods.compress.residual_slicing import (
    measured_folder,
    principal_axes,
    residual_axis,
    sliced_plan,
    write_sliced,
)
from eckart.methods.compress.sweep import Sweep
from eckart.methods.compress.table import recipe_of, settings_of, summary_of
from eckart.progress import Progress, silent
from eckart.stats import Store


def compress(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "eckart",
    keep: float | None = None,
    bytes: int | str | None = None,
    flops: str | None = None,
    latency: str | None = None,
    calibration: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    elastic: bool = False,
    least: float = 0.5,
    cache: bool = True,
    check: bool = True,
    progress: Progress = silent,
) -> Outcome:
    """Compress a Hugging Face model folder into a smaller one that `from_pretrained` loads.

    Memory holds one block, its statistics and the hidden states of the calibration samples (of methods that train the
    whole model, the whole model); the process that checks the result holds that. A run that was stopped is continued by
    the same call and ends in the same bytes.

    Args:
        model: folder of a decoder or encoder with safetensors weights.
        out: folder to write; must not hold anything yet.
        method: one of `eckart.METHODS`.
        keep: share of the whole model's parameters that remains, in (0, 1]; if no budget is given 0.6, or 1 for methods
            that only store parameters in fewer bits, which take nothing else.
        bytes: instead: bytes all parameters may take, index tensors included; or text, "20MB" or "20MiB".
        flops: instead: share of the operations of the linear layers and the head for one token, as in "0.6x".
        latency: instead: share of their time, measured on this device, as in "0.7x".
        calibration: text file; methods that use no data do without.
        samples: calibration samples; by default 128 windows for decoders, 2,048 lines drawn from the text for encoders
            (as many as they train on, for methods that train the whole model), or what there is.
        length: tokens per sample, 256 by default.
        seed: seed of everything random.
        settings: settings of the method by name, typed.
        elastic: whether the folder also holds what `load` and `slice_folder` need to give every smaller size.
        least: the smallest of those, as a share like `keep`; only read if elastic.
        cache: whether to keep statistics for later runs, in $ECKART_CACHE or the user's cache folder.
        check: whether a fresh process loads the folder before it gets its name, and must find what was promised.
        progress: called with (stage, steps done, steps in all).

    Raises:
        EckartError: for bad input of any kind, in one sentence, or a failed check; nothing is written then.
    """
    started, target = time.perf_counter(), Path(out)
    check_output(target)
    budget = {"keep": keep, "bytes": bytes, "flops": flops, "latency": latency}
    request = _request(model, method, budget, calibration, samples, length, seed, settings)
    if elastic:
        request = replace(request, sizes=sizes_of(request.limit, least))
    job = _opened(request, progress)
    run = _plain if job.recipe.plain else _by_layers
    outcome = run(job, target, cache, check, progress)
    return replace(outcome, seconds=time.perf_counter() - started)


def _opened(request: Request, progress: Progress) -> Job:
    """Return the checked job of a request."""
    job = open_job(request, progress)
    if request.sizes:
        check_elastic(job)
    return job


@contextmanager
def _begun(job: Job, target: Path) -> Iterator[Partial]:
    """Give the finished parts of a job beside its target, which stay behind only where hours of good work failed."""
    partial = Partial(target.absolute().with_name(f".{target.absolute().name}.eckart-{job.key[:8]}"))
    try:
        partial.begin({"out": str(target), "settings": _described(job)})
        yield partial
    except EckartError as error:
        if not partial.worth_keeping() or isinstance(error, BrokenOutputError):
            partial.discard()
        raise
    partial.discard()


def _by_layers(job: Job, target: Path, cache: bool, check: bool, progress: Progress) -> Outcome:
    """Compress layer by layer, continuing what an earlier run of the same job has left."""
    layers = layers_of(job)
    check_layers(job, layers)
    with _begun(job, target) as partial:
        outcome, expected = _compressed(job, layers, partial, target, cache, progress)
        checked = _publish(job, partial, outcome, expected if check else None, progress)
    return replace(outcome, checked=checked)


def _plain(job: Job, target: Path, cache: bool, check: bool, progress: Progress) -> Outcome:
    """Write a smaller model, beside the target while it is made; it has no statistics to cache."""
    make, codes = _sliced if job.recipe.sliced else _shortened, job.recipe.coding is not None
    with _begun(job, target) as partial:
        folder = partial.fresh_folder(SMALL) if codes else partial.fresh_folder()
        planned, measured, expected = make(job, partial, folder, progress)
        small = job
        if codes:
            small, rounded, expected = coded_model(job, folder, partial, progress)
            measured = replace(rounded, before=measured.before)
        outcome = Outcome(planned, target, measured, 0.0, peak_memory(), _described(job))
        texts = _texts(job, outcome, expected.promise if check else None)
        if codes:
            folder = _written(small, partial, _made_by(outcome), texts, progress)
        else:
            for name, text in texts.items():
                write_text(folder / name, text)
        checked = _checked(job, folder, planned, expected if check else None, progress)
        publish(folder, target)
    return replace(outcome, checked=checked)


def _sliced(job: Job, partial: Partial, folder: Path, progress: Progress) -> tuple[Plan, Measured, Expected]:
    """Write a model with fewer residual coordinates."""
    axis = residual_axis(job)
    kept, planned = sliced_plan(job, axis)
    basis = principal_axes(job, axis, progress)[:, :kept]
    write_sliced(job, axis, basis, folder, progress)
    return planned, *measured_folder(job, folder)


def _shortened(job: Job, partial: Partial, folder: Path, progress: Progress) -> tuple[Plan, Measured, Expected]:
    """Write a model with fewer blocks."""
    stack = shortened(job, partial.folder, progress)
    write_short(stack, folder, progress)
    return short_plan(job, stack.kept), *measured_stack(stack)


def _compressed(
    job: Job, layers: list[Layer], partial: Partial, out: Path, cache: bool, progress: Progress
) -> tuple[Outcome, Expected]:
    """Do all the work of a job up to its last finished part; return the outcome and what to expect of the reload."""
    store = statistics_store(job, None if cache else partial.folder)
    collect(job, store, Store(partial.folder / "boundaries"), progress)
    known = corrected(job, layers, Known(job, store), partial.folder, progress)
    measured: Measured | None
    if job.recipe.learner is not None:
        found, measured, expected = Learning(job, known, layers, partial.folder, progress).run(partial)
    elif job.request.sizes:
        table = _all_candidates(job, layers, known, progress)
        elastic = ordered(job, layers, table, partial)
        found = Allocation(chosen_of(elastic), table, elastic.fixed)
        measured, expected = ElasticSweep(job, known, layers, found, elastic, partial, progress).run()
    else:
        found = allocate(job, layers, known, predict=False, progress=progress)
        measured, expected = Sweep(job, known, layers, found, partial, progress).run()
        if job.recipe.heals_by_lora and measured is not None and partial.records():
            partial.path(HEALED).unlink(missing_ok=True)  # of a run that was stopped: its base is the finished blocks
            folder = _written(job, partial, {}, {}, silent)
            measured, expected = heal_by_lora(job, partial, folder, measured, progress)
    if cache:
        trim_cache(store)
    planned = _as_stored(job, layers, found, partial.records())
    return Outcome(planned, out, measured, 0.0, peak_memory(), _described(job)), expected


def _all_candidates(job: Job, layers: list[Layer], known: Known, progress: Progress) -> list[Candidates]:
    """Return what every layer may become, with predicted losses."""
    return surveyed(job, layers, known, errors=True, progress=lambda i: progress("plan", i, len(layers)))


def _publish(
    job: Job, partial: Partial, outcome: Outcome, expected: Expected | None, progress: Progress
) -> Checked | None:
    """Write the finished parts as a model folder, check it unless nothing is expected, and give it its name."""
    texts = _texts(job, outcome, None if expected is None else expected.promise)
    folder = _written(job, partial, _made_by(outcome), texts, progress)
    checked = _checked(job, folder, outcome.plan, expected, progress)
    publish(folder, outcome.out)
    return checked


def _written(
    job: Job, partial: Partial, made_by: Mapping[str, Any], texts: Mapping[str, str], progress: Progress
) -> Path:
    """Write the finished parts as a model folder inside the partial one."""
    head = job.parts.head if job.parts.tied else None
    entries = layer_entries(partial.records(), job.parts.embedding, head)
    return write_folder(partial, job.model, job.parts.blocks, entries, made_by, texts, progress, job.request.sizes)


def _checked(job: Job, folder: Path, plan: Plan, expected: Expected | None, progress: Progress) -> Checked | None:
    """Check a finished folder unless nothing is expected."""
    if expected is None:
        return None
    progress("reload", 0, 1)
    checked = check_reload(job, folder, plan, expected)
    progress("reload", 1, 1)
    return checked


def plan(
    model: str | Path,
    *,
    method: str = "eckart",
    keep: float | None = None,
    bytes: int | str | None = None,
    flops: str | None = None,
    latency: str | None = None,
    calibration: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    elastic: bool = False,
    least: float = 0.5,
    cache: bool = True,
    progress: Progress = silent,
) -> Plan:
    """Return what `compress` would make of every layer, with predicted losses; writes nothing but cached statistics.

    Args and errors are those of `compress`. The plan of an elastic folder is that of its largest size, with the figures
    of all sizes that components would be fitted at.
    """
    budget = {"keep": keep, "bytes": bytes, "flops": flops, "latency": latency}
    request = _request(model, method, budget, calibration, samples, length, seed, settings)
    job = _opened(replace(request, sizes=sizes_of(request.limit, least)) if elastic else request, progress)
    if job.recipe.sliced:
        return sliced_plan(job, residual_axis(job))[1]
    if job.recipe.removal is not None:
        with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
            return short_plan(job, shortened(job, Path(scratch), progress, last=False).kept)
    layers = layers_of(job)
    check_layers(job, layers)
    with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
        store = statistics_store(job, None if cache else Path(scratch))
        collect(job, store, Store(Path(scratch) / "boundaries"), progress)
        known = corrected(job, layers, Known(job, store), Path(scratch), progress)
        if job.request.sizes:
            return elastic_plan(job, layers, _all_candidates(job, layers, known, progress))
        if job.recipe.learner is not None:
            found = Learning(job, known, layers, Path(scratch), progress).plan()
        else:
            found = allocate(job, layers, known, predict=True, progress=progress)
    return plan_of(job, layers, found)


def _request(
    model: str | Path,
    method: str,
    budget: Mapping[str, Any],
    calibration: str | Path | None,
    samples: int | None,
    length: int | None,
    seed: int,
    settings: Mapping[str, Any] | None,
) -> Request:
    text = None if calibration is None else Path(calibration)
    given = dict(budget)
    if all(value is None for value in given.values()):
        given["keep"] = recipe_of(method, settings).usual_keep
    keep = given.pop("keep")
    return Request(Path(model), method, keep, text, samples, length, seed, dict(settings or {}), **given)


def _as_stored(job: Job, layers: list[Layer], allocation: Allocation, records: list[LayerRecord]) -> Plan:
    """Return the plan with the ranks, numbers and errors of what was written."""
    dense = {c.name: c.dense for c in allocation.table}
    base = plan_of(job, layers, replace(allocation, chosen=dense, narrowed=[]))
    written = {record.name: record for record in records}
    rows = [
        replace(row, structure=r.structure, rank=r.rank, numbers=r.numbers, nbytes=r.nbytes, loss=r.loss)
        if (r := written.get(row.name)) is not None
        else row
        for row in base.layers
    ]
    return plan_from(job, rows, allocation)


def _described(job: Job) -> dict[str, Any]:
    """Return everything that decided the result, in plain values."""
    request = job.request
    defaults = {name: setting.default for name, setting in settings_of(request.method).items()}
    return {
        "model": request.model.name,
        "method": request.method,
        request.limit.option: request.limit.value,
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


def _report(outcome: Outcome, promised: dict[str, Any] | None) -> str:
    """Return the outcome as JSON, without what differs between two runs of the same job."""
    kept = {k: v for k, v in outcome.as_dict().items() if k not in ("out", "seconds", "peak_memory")}
    return json.dumps({**kept, "checked": promised}, indent=2) + "\n"


def _measured(measured: Measured | None) -> dict[str, Any] | None:
    return None if measured is None else asdict(measured)


def _texts(job: Job, outcome: Outcome, promised: dict[str, Any] | None) -> dict[str, str]:
    """Return the text files that every folder gets."""
    return {"README.md": _card(job, outcome, promised), "eckart.json": _report(outcome, promised)}


def _card(job: Job, outcome: Outcome, promised: dict[str, Any] | None) -> str:
    summary = summary_of(job.request.method)
    stated = {**_made_by(outcome), **inherited(job.model.folder), "method_summary": summary, "checked": promised}
    name, rows = str(outcome.settings["model"]), [asdict(row) for row in outcome.plan.layers]
    return model_card(name, outcome.settings, stated, rows)
