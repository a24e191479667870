"""Fine-tuning a model folder with an adapter, from data to a saved adapter with its measured before and after."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.atomic import appearing, check_output, make_folder, write_json
from eckart.errors import EckartError
from eckart.files.text import load_tokenizer
from eckart.methods.adapt.adapt import adapt, adapters
from eckart.methods.adapt.adapters import Adapters
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.rates import GRID, curvature_rate, find_rate
from eckart.methods.adapt.saving import Format
from eckart.methods.adapt.tasks import Examples, batch_of, load_task_model, measured, read_examples
from eckart.methods.training import Course, Share, Step, train
from eckart.progress import Progress, silent

REPORT = "report.json"
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
        before: measures on held-out examples before training.
        after: the same after.
        seconds: how long all of it took.
    """

    method: str
    out: Path
    trained: int
    parameters: int
    rate: float
    steps: int
    before: dict[str, float]
    after: dict[str, float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"out": str(self.out)}


def tune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    method: str = "lora",
    validation: str | Path | None = None,
    text_field: str = "text",
    label_field: str | None = None,
    steps: int = 500,
    batch: int = 8,
    length: int = 256,
    rate: float | Literal["auto", "curvature"] | None = None,
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
        validation: what to measure on; by default the last tenth of the data, 512 examples at most.
        text_field: field or column of the text.
        label_field: the same of the label, which makes it a classification.
        steps: optimizer steps, of `batch` examples each.
        batch: examples per step.
        length: tokens of a window of text, and the most of a sentence.
        rate: of AdamW; by default the method's, what a short sweep around that finds if "auto", and what the
            curvature of the loss allows if "curvature", which takes fewer passes.
        targets: layers to adapt, as `eckart.adapt` takes them.
        seed: seed of everything random.
        format: "eckart", or "peft" for what PEFT can express.
        settings: settings of the method by name, typed.
        progress: told of the stages "statistics", "gradients" and "train".

    Raises:
        EckartError: for bad input, in one sentence, or a run that diverges; nothing is written then.
    """
    began, target, given = time.perf_counter(), Path(out), dict(settings or {})
    course = Course(steps, _starting_rate(rate, Described(method, given, seed).recipe().rate), batch)
    check_output(target)
    fields = {"length": length, "text_field": text_field, "label_field": label_field}
    examples, held_out = _examples(Path(model), Path(data), validation, fields)
    torch.manual_seed(seed)  # a head that is new starts anew
    base = load_task_model(Path(model), examples.labels)
    before, start = measured(base, held_out), _batches(examples, batch)
    handle = adapters(adapt(base, method, targets=targets, data=start, seed=seed, progress=progress, **given))
    _rehearse(handle, format)
    decides = str(model), method, given, seed, rate, asdict(course), list(targets or ()), fields
    partial = _partial(target, decides, examples)
    course = _Run(handle, examples, held_out, seed, partial, progress).train(course, rate)
    after, numbers = measured(base, held_out), (handle.count(), sum(p.numel() for p in base.parameters()))
    tuned = Tuned(method, target, *numbers, course.rate, steps, before, after, time.perf_counter() - began)
    _publish(handle, tuned, partial, format)
    return tuned


def _starting_rate(rate: float | str | None, own: float) -> float:
    """Return the rate given, or the method's own where none is or it has yet to be found."""
    if isinstance(rate, str) and rate not in ("auto", "curvature"):
        raise EckartError(f"rate must be a number, 'auto' or 'curvature', got {rate!r}")
    return rate if isinstance(rate, float | int) else own


def _rehearse(handle: Adapters, form: Format) -> None:
    """Save the adapter as it starts, so that a format that cannot express it is refused before hours of work."""
    with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
        handle.save(Path(scratch) / "adapter", format=form)


def _publish(handle: Adapters, tuned: Tuned, partial: Path, form: Format) -> None:
    """Write the adapter and the report, without what differs between two runs, and delete the run's state."""
    with appearing(tuned.out) as folder:
        handle.save(folder, format=form)
        write_json(folder / REPORT, {k: v for k, v in tuned.as_dict().items() if k not in ("out", "seconds")})
    shutil.rmtree(partial, ignore_errors=True)


def _batches(examples: Examples, size: int) -> list[dict[str, Tensor]]:
    """Return the first examples as batches that data-driven starts are made from."""
    return [batch_of(rows, examples.labels) for rows in examples.rows[:START].split(size)]


def _examples(
    model: Path, data: Path, validation: str | Path | None, fields: Mapping[str, Any]
) -> tuple[Examples, Examples]:
    """Return what to train on and what to measure on."""
    tokenizer = load_tokenizer(model)
    examples = read_examples(tokenizer, data, **fields)
    if validation is None:
        return examples.split()
    return examples, read_examples(tokenizer, Path(validation), **fields, labels=examples.labels)


def _partial(target: Path, described: Sequence[Any], examples: Examples) -> Path:
    """Return the folder of the run's state, beside the target and named by all that decides the result."""
    digest = hashlib.sha256(json.dumps(described, default=str).encode())
    digest.update(examples.rows.numpy().tobytes())
    return target.absolute().with_name(f".{target.absolute().name}.eckart-{digest.hexdigest()[:8]}")


@dataclass(frozen=True, slots=True)
class _Run:
    """The training of an adapter that is on its model."""

    handle: Adapters
    examples: Examples
    held_out: Examples
    seed: int
    partial: Path
    progress: Progress

    def train(self, course: Course, rate: float | str | None) -> Course:
        """Train what the adapter's method trains, or go on from where an earlier run stopped; return how it went."""
        make_folder(self.partial)
        course = self._found(course, rate) if isinstance(rate, str) else course
        state = self.partial / "state.safetensors"
        train(
            self.handle.model.train(), self._rows(), course, self._loss,
            state=state, seed=self.seed, share=self._shares(), progress=self.progress,
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
            share=self._shares(), seed=self.seed, grid=GRID, progress=self.progress,
        )  # fmt: skip
        return list(found)

    def _loss(self, step: Step) -> tuple[Tensor, Tensor]:
        task: Tensor = self.handle.model(**batch_of(step.samples, self.examples.labels)).loss
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
