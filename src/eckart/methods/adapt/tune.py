"""Fine-tuning a model folder with an adapter, from data to a saved adapter with its measured before and after."""

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.atomic import appearing, check_output, make_folder, write_json
from eckart.errors import EckartError
from eckart.files.adapters import TENSORS
from eckart.files.folder import check_model_folder
from eckart.files.text import load_tokenizer
from eckart.methods.adapt.adapt import HEADS, adapt, adapters, check_seed, require_follower
from eckart.methods.adapt.adapters import Adapters
from eckart.methods.adapt.calibration import calibration_error, fit_temperature
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.folding import REPORT
from eckart.methods.adapt.loading import load_adapter
from eckart.methods.adapt.rates import GRID, curvature_rate, find_rate
from eckart.methods.adapt.saving import Format
from eckart.methods.adapt.tasks import Examples, answers, batch_of, load_task_model, measured, read_examples
from eckart.methods.training import Course, Share, Step, train
from eckart.progress import Progress, silent

# What the adapter of an earlier task is called while a later one trains.
EARLIER = "earlier"
# Examples that data-driven starts are made from.
START = 64
# Fewest and most steps of the short runs that a rate is chosen by.
SWEEP = 10, 50


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a fine-tune did.

    Attributes:
        method: the method of adaptation.
        out: the adapter's folder.
        trained: parameters that trained.
        parameters: of the whole model.
        rate: learning rate.
        steps: optimizer steps.
        probe: optimizer steps that the head trained alone before.
        before: measures on held-out examples before training.
        after: the same after.
        calibration: of a classification: the temperature that half of the held-out examples ask for, and the expected
            calibration error of the other half without ("error") and with it ("scaled").
        seconds: how long all of it took.
        labels: names of the classes in the order of the head's outputs; none of texts.
    """

    method: str
    out: Path
    trained: int
    parameters: int
    rate: float
    steps: int
    probe: int
    before: dict[str, float]
    after: dict[str, float]
    calibration: dict[str, float]
    seconds: float
    labels: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"out": str(self.out)}


def tune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    method: str = "lora",
    after: str | Path | None = None,
    validation: str | Path | None = None,
    text_field: str = "text",
    label_field: str | None = None,
    steps: int = 500,
    batch: int = 8,
    length: int = 256,
    rate: float | Literal["auto", "curvature"] | None = None,
    probe: int = 0,
    probe_rate: float = 1e-3,
    targets: str | Sequence[str] | None = None,
    seed: int = 0,
    format: Format = "eckart",
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Tuned:
    """Fine-tune a model folder with an adapter and save that; the same call continues a run that was stopped.

    Args:
        model: folder of a decoder, or of an encoder or decoder to classify with; dense or compressed by eckart.
        data: text or .jsonl to learn, or labelled rows in a .jsonl or .tsv file, plain or gzip.
        out: folder to write; must not hold anything yet.
        method: one of `eckart.ADAPTERS`.
        after: folder of the adapter of an earlier task that this one builds on, for methods that can.
        validation: what to measure on; by default a tenth of the data, 512 examples at most (`Examples.split`).
        text_field: field or column of the text.
        label_field: the same of the label, which makes it a classification.
        steps: optimizer steps, of `batch` examples each.
        batch: examples per step.
        length: tokens of a window of text, and the most of a sentence.
        rate: of AdamW; by default the method's, what a short sweep around that finds if "auto", and what the
            curvature of the loss allows if "curvature", which takes fewer passes.
        probe: optimizer steps in which the head of a classification trains alone, before the adapter is made (LP-FT).
        probe_rate: of AdamW in these steps.
        targets: layers to adapt, as `eckart.adapt` takes them.
        seed: seed of everything random.
        format: "eckart", or "peft" for what PEFT can express.
        settings: settings of the method by name, typed.
        progress: told of the stages "probe", "statistics", "gradients" and "train".

    Raises:
        EckartError: for bad input, in one sentence, or a run that diverges; nothing is written then.
    """
    began, target, described = time.perf_counter(), Path(out), Described(method, dict(settings or {}), seed)
    _check(target, described, length, probe, probe_rate, label_field, after)
    given, course = described.settings, Course(steps, _starting_rate(rate, described.recipe().rate), batch)
    fields = {"length": length, "text_field": text_field, "label_field": label_field}
    base, heads, examples, held_out = _task(Path(model), Path(data), validation, fields, seed)
    before, start = measured(base, held_out), _batches(examples, batch, seed)
    how = {"after": after, "targets": targets, "data": start, "trained": heads, "seed": seed, **given}
    decides = str(model), method, given, seed, rate, asdict(course), list(targets or ()), fields, probe, probe_rate
    run = _Run(base, method, how, examples, held_out, _partial(target, examples, decides, after), format, progress)
    course = run.train(course, rate, Course(probe, probe_rate, batch) if probe else None)
    return _publish(run, target, course, probe, before, began)


def _starting_rate(rate: float | str | None, own: float) -> float:
    """Return the rate given, or the method's own where none is or it has yet to be found."""
    if isinstance(rate, str) and rate not in ("auto", "curvature"):
        raise EckartError(f"rate must be a number, 'auto' or 'curvature', got {rate!r}")
    return rate if isinstance(rate, float | int) else own


def _check(
    target: Path,
    described: Described,
    length: int,
    probe: int,
    probe_rate: float,
    label_field: str | None,
    after: str | Path | None,
) -> None:
    """Refuse a folder that holds something, numbers out of range, and a head that a task does not have or must not."""
    check_output(target)
    check_seed(described.seed)
    if length < 2:  # a window of one token has no next one to predict
        raise EckartError(f"length must be at least 2, got {length}")
    if probe < 0:
        raise EckartError(f"probe must not be negative, got {probe}")
    if not 0 < probe_rate < math.inf:
        raise EckartError(f"probe_rate must be positive and finite, got {probe_rate}")
    if probe and label_field is None:
        raise EckartError(
            "probe trains the head of a classification, and texts have none; give a label field or no probe"
        )
    if after is not None:
        require_follower(described)
    if after is not None and label_field is not None:
        raise EckartError(
            "the head of a classification would train whole and change what the earlier task computes; leave the "
            "label field or after out, or call eckart.adapt with trained=() and keep heads outside of the model"
        )


def _calibration(model: nn.Module, held_out: Examples) -> dict[str, float]:
    """Return the temperature found on every second example and what it does to the others; nothing for texts."""
    if not held_out.labels or len(held_out.rows) < 2:
        return {}
    logits, labels = answers(model, held_out)
    temperature, rest = fit_temperature(logits[::2], labels[::2]), (logits[1::2], labels[1::2])
    scaled = calibration_error(rest[0] / temperature, rest[1])
    return {"temperature": temperature, "error": calibration_error(*rest), "scaled": scaled}


def _publish(run: "_Run", target: Path, course: Course, probe: int, before: dict[str, float], began: float) -> Tuned:
    """Write the adapter and the report, without what differs between two runs, and delete the run's state."""
    numbers = run.handle.count(), sum(p.numel() for p in run.model.parameters()), course.rate, course.steps, probe
    after, calibration = measured(run.model, run.held_out), _calibration(run.model, run.held_out)
    tuned = Tuned(
        run.method, target, *numbers, before, after, calibration, time.perf_counter() - began, run.examples.labels
    )
    with appearing(target) as folder:
        run.handle.save(folder, format=run.form)
        write_json(folder / REPORT, {k: v for k, v in tuned.as_dict().items() if k not in ("out", "seconds")})
    shutil.rmtree(run.partial, ignore_errors=True)
    return tuned


def _digest(folder: str | Path | None) -> str:
    """Return what tells one adapter's folder from another."""
    path = None if folder is None else Path(folder) / TENSORS
    return "" if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()


def _batches(examples: Examples, size: int, seed: int) -> list[dict[str, Tensor]]:
    """Return some examples as batches that data-driven starts are made from."""
    return [batch_of(rows, examples.labels) for rows in examples.drawn(START, seed).split(size)]


def _task(
    model: Path, data: Path, validation: str | Path | None, fields: Mapping[str, Any], seed: int
) -> tuple[nn.Module, tuple[str, ...] | None, Examples, Examples]:
    """Return the model for the task, what of it trains whole (None: as always), what to train and to measure on."""
    check_model_folder(model)
    tokenizer = load_tokenizer(model)
    examples = read_examples(tokenizer, data, **fields)
    if validation is None:
        examples, held_out = examples.split(seed)
    else:
        held_out = read_examples(tokenizer, Path(validation), **fields, labels=examples.labels)
    torch.manual_seed(seed)  # a head that is new starts anew
    base, new = load_task_model(model, examples.labels)
    known = [name for name, _ in base.named_children() if name in HEADS]
    return base, tuple(sorted({*known, *new})) if examples.labels and new else None, examples, held_out


def _partial(target: Path, examples: Examples, decides: Sequence[Any], after: str | Path | None) -> Path:
    """Return the folder of the run's state, beside the target and named by all that decides the result."""
    digest = hashlib.sha256(json.dumps((*decides, _digest(after)), default=str).encode())
    digest.update(examples.rows.numpy().tobytes())
    return target.absolute().with_name(f".{target.absolute().name}.eckart-{digest.hexdigest()[:8]}")


class _Run:
    """The training of a model's adapter, and of its head before that."""

    def __init__(
        self,
        model: nn.Module,
        method: str,
        how: Mapping[str, Any],
        examples: Examples,
        held_out: Examples,
        partial: Path,
        form: Format,
        progress: Progress,
    ) -> None:
        self.model, self.method, self.how = model, method, how
        self.examples, self.held_out, self.partial, self.form = examples, held_out, partial, form
        self.seed, self.progress = int(how["seed"]), progress
        self.handle = self._adapted()
        self._check_format()

    def _adapted(self) -> Adapters:
        how = {**self.how, "progress": self.progress}
        folder = how.pop("after")
        if folder is not None:
            load_adapter(self.model, folder, EARLIER)
        return adapters(adapt(self.model, self.method, after=None if folder is None else EARLIER, **how))

    def _check_format(self) -> None:
        """Refuse a format that cannot express the adapter before hours of work."""
        with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
            self.handle.save(Path(scratch) / "adapter", format=self.form)

    def _probe(self, course: Course) -> None:
        """Train the head alone, or put it where an earlier run left it, and make the adapter again: what it starts from
        may depend on the head.
        """
        heads = [head for name in self.handle.names for head in self.handle.state.described[name].trained]
        if not heads:
            raise EckartError("no module of this model is known as its head; leave probe out")
        model = self.handle.remove().train()
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        for head in heads:
            model.get_submodule(head).requires_grad_(True)
        train(
            model, self._rows(), course, self._task,
            state=self.partial / "probe.safetensors", seed=self.seed, stage="probe", progress=self.progress,
        )  # fmt: skip
        _release(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        self.handle = self._adapted()

    def train(self, course: Course, rate: float | str | None, probe: Course | None) -> Course:
        """Train what the adapter's method trains, or go on from where an earlier run stopped; return how it went."""
        make_folder(self.partial)
        if probe is not None:
            self._probe(probe)
        course = self._found(course, rate) if isinstance(rate, str) else course
        state = self.partial / "state.safetensors"
        train(
            self.handle.model.train(), self._rows(), course, self._loss,
            state=state, seed=self.seed, follow=lambda optimizer: self._follow(optimizer, course.steps),
            share=self._shares(), progress=self.progress,
        )  # fmt: skip
        _release(self.handle.model)
        return course

    def _found(self, course: Course, how: str) -> Course:
        """Return the course at the rate that a short sweep or the curvature finds, or that an earlier run found."""
        path = self.partial / "rates.json"
        if not path.is_file():
            write_json(path, self._curvature(course) if how == "curvature" else self._swept(course))
        return replace(course, rate=float(json.loads(path.read_text(encoding="utf-8"))[0]))

    def _curvature(self, course: Course) -> list[float]:
        model, shares = self.handle.model.train(), self._shares()
        rows, progress = self._rows(), self.progress
        return [curvature_rate(model, rows, course, self._loss, share=shares, seed=self.seed, progress=progress)]

    def _swept(self, course: Course) -> list[float]:
        short = replace(course, steps=max(SWEEP[0], min(SWEEP[1], course.steps // 10)), final=1.0)
        model, few = self.handle.model.train(), replace(self.held_out, rows=self.held_out.rows[:START])
        found = find_rate(
            model, self._rows(), short, self._loss, lambda: measured(model, few)["loss"],
            share=self._shares(), follow=lambda optimizer: self._followed(optimizer, short.steps),
            seed=self.seed, grid=GRID, progress=self.progress,
        )  # fmt: skip
        return list(found)

    def _follow(self, optimizer: Any, steps: int) -> Iterable[str]:
        moving = self._followed(optimizer, steps)
        self._check_format()  # what moves has got all of its changes now
        return moving

    def _followed(self, optimizer: Any, steps: int) -> Iterable[str]:
        self.handle.follow(optimizer, steps)
        return self.handle.moving()

    def _task(self, step: Step) -> tuple[Tensor, Tensor]:
        task: Tensor = self.handle.model(**batch_of(step.samples, self.examples.labels)).loss
        return task, task

    def _loss(self, step: Step) -> tuple[Tensor, Tensor]:
        task, _ = self._task(step)
        return task + self.handle.penalty(), task

    def _rows(self) -> Tensor:
        return self.examples.rows.to(next(self.handle.model.parameters()).device)

    def _shares(self) -> Share:
        groups = self.handle.parameter_groups(1.0)
        shares = {id(p): group["lr"] for group in groups for p in group["params"]}
        named = {name: shares[id(p)] for name, p in self.handle.model.named_parameters() if id(p) in shares}
        return lambda name: named.get(name, 1.0)


def _release(model: nn.Module) -> None:
    """Put a model into evaluation mode without gradients left behind."""
    model.eval()
    for parameter in model.parameters():
        parameter.grad = None
