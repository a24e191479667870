"""The last step before a folder gets its name: a fresh process loads it, and finds what was promised, or it is deleted.

    | a - b |_max <= TOLERANCE | b |_max

a: logits (or hidden states) of the loaded model; b: those of the compressed model in memory at the end of the pass that
made it, on samples that no fit has seen. Besides, no tensor may be missing, left over or of another shape; numbers and
bytes, in the files and in the loaded model, are those of the plan; and no layer is larger than it was.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eckart.atomic import write_json, write_tensors
from eckart.errors import EckartError
from eckart.files.folder import tensor_file
from eckart.files.sharing import SHARED
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import dense_bytes
from eckart.methods.compress.measure import LOGITS, outputs
from eckart.methods.compress.outcome import Checked, LayerPlan, Plan, Speed
from eckart.methods.reload import ANSWERS, FINDINGS, LOADING, Order, answers_of

# What rounding may do: sums of float32 numbers in another order, in every layer of a deep model.
TOLERANCE = 1e-3
# Samples compared: the first, the last, and one between.
SAMPLES = 3


class BrokenOutputError(EckartError):
    """A folder that is not what was promised; nothing of it is worth keeping."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Samples, and what the compressed model in memory makes of them.

    Attributes:
        what: "logits" or "hidden states".
        samples: token ids (1, t) each.
        answers: those at the last positions of each sample, float32.
        positions: how many of the last positions those are.
    """

    what: str
    samples: list[Tensor]
    answers: list[Tensor]
    positions: int

    @property
    def promise(self) -> dict[str, Any]:
        """What a folder that is published has been checked for; nothing that differs between two runs of a job."""
        return {"what": self.what, "tolerance": TOLERANCE, "tokens": sum(ids.numel() for ids in self.samples)}


def expectation(
    job: Job, batches: Sequence[Tensor], hidden: Sequence[Tensor], heads: Mapping[str, nn.Module]
) -> Expected:
    """Return what a few samples give in the compressed model.

    Args:
        job: the job.
        batches: token ids (b, t).
        hidden: the last compressed block's outputs (b, t, d) of each batch.
        heads: modules in place of the model's head.
    """
    rows = [(ids[j : j + 1], h[j : j + 1]) for ids, h in zip(batches, hidden, strict=True) for j in range(len(ids))]
    chosen, positions = _spread(len(rows)), _positions(job)
    samples, states = [rows[i][0] for i in chosen], [rows[i][1] for i in chosen]
    found = [answers_of(output, positions) for _, output in outputs(job.runner, samples, states, heads)]
    return Expected(_kind(job), samples, found, positions)


@torch.no_grad()
def expectation_of(job: Job, batches: Sequence[Tensor], model: nn.Module) -> Expected:
    """Return what a few samples give in a compressed model that is in memory as a whole.

    Args:
        job: the job.
        batches: token ids (b, t).
        model: the model, with its rounded numbers.
    """
    rows, positions = [ids[j : j + 1] for ids in batches for j in range(len(ids))], _positions(job)
    samples = [rows[i] for i in _spread(len(rows))]
    found = [answers_of(model(input_ids=ids.to(job.runner.device)), positions) for ids in samples]
    return Expected(_kind(job), samples, found, positions)


def _kind(job: Job) -> str:
    """Return what the model answers."""
    return "hidden states" if job.parts.head is None else "logits"


def _spread(count: int) -> list[int]:
    """Return which of so many samples are compared."""
    return sorted({i * (count - 1) // (SAMPLES - 1) for i in range(SAMPLES)})


def _positions(job: Job) -> int:
    """Return at how many of the last positions answers are compared."""
    return max(1, LOGITS // int(getattr(job.model.config, "vocab_size", None) or 1))


def check_reload(job: Job, folder: Path, plan: Plan, expected: Expected) -> Checked:
    """Load a finished folder in a fresh process and hold it to what was promised.

    Args:
        job: the job.
        folder: the folder, complete but not yet published; the process writes beside it.
        plan: what every layer became.
        expected: what the model in memory answers.

    Raises:
        BrokenOutputError: naming what differs.
        EckartError: if the process could not do its work.
    """
    numbers, index_bytes = _check_files(job, folder, plan)
    answers, findings = _reloaded(job, folder, plan, expected)
    for kind, names in findings["faults"].items():
        if names:
            raise _broken(f"it loads with {kind.replace('_keys', '')} tensors, for instance {names[0]}")
    _check_equal("numbers in the loaded model", findings["numbers"], numbers)
    _check_equal("bytes of index tensors in the loaded model", findings["index_bytes"], index_bytes)
    differences = [_difference(a, b) for a, b in zip(answers, expected.answers, strict=True)]
    for difference in differences:
        if not difference <= TOLERANCE:  # NaN is not
            raise _broken(
                f"its {expected.what} differ from those of the compressed model in memory by {difference:.1e} of the "
                f"largest, more than {TOLERANCE:g}"
            )
    speeds = {task: Speed(1 / taken["dense"], 1 / taken["compressed"]) for task, taken in findings["seconds"].items()}
    return Checked(**expected.promise, difference=max(differences), nbytes=plan.bytes_after, speeds=speeds)


def _check_files(job: Job, folder: Path, plan: Plan) -> tuple[int, int]:
    """Hold the sizes of the files and layers to the plan; return the floating numbers and the bytes of other tensors,
    which are indices and codes.
    """
    if not job.recipe.plain:  # slicing may give a tied head a matrix that was none
        _check_layers(job, folder, plan)
    tensors, buffers = tensor_file(folder), job.model.buffers()
    numbers = floating = whole = 0
    for name in tensors.files:
        if name not in buffers:
            count, dtype = math.prod(tensors.shape(name)), tensors.dtype(name)
            whole += count * dtype.itemsize
            if dtype.is_floating_point:
                numbers, floating = numbers + count, floating + count * dtype.itemsize
    if not job.stores_codes:  # plans count codes as numbers, and not what says how to read them
        _check_equal("numbers in its files", numbers, plan.parameters_after)
    _check_equal("bytes in its files", whole, plan.bytes_after)
    return numbers, whole - floating


def _check_layers(job: Job, folder: Path, plan: Plan) -> None:
    """Check that no layer is larger than it was; layers that share are taken together.

    Of codes, numbers alone: with small groups or tables of levels they take what was asked for.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries = config.get("quantization_config", {}).get("layers", {})
    units: dict[str, list[LayerPlan]] = {}
    for row in plan.layers:
        owners = entries.get(row.name, {}).get(SHARED, {}).values()
        units.setdefault(next(iter(owners), row.name), []).append(row)
    for name, rows in units.items():
        nbytes, dense = sum(row.nbytes for row in rows), sum(_dense_bytes(job, row) for row in rows)
        if sum(row.numbers - row.dense_numbers for row in rows) > 0 or (job.recipe.coding is None and nbytes > dense):
            raise _broken(f"{name} takes {nbytes:,} bytes, more than the {dense:,} it took before")


def _dense_bytes(job: Job, row: LayerPlan) -> int:
    return dense_bytes(job, row.name, row.shape, row.dense_numbers - math.prod(row.shape))


def _check_equal(what: str, found: int, promised: int) -> None:
    if found != promised:
        raise _broken(f"there are {found:,} {what}, where the plan says {promised:,}")


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest magnitude expected."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _broken(what: str) -> BrokenOutputError:
    return BrokenOutputError(f"the compressed folder failed its own check and was deleted: {what}; please report this")


def _reloaded(job: Job, folder: Path, plan: Plan, expected: Expected) -> tuple[list[Tensor], dict[str, Any]]:
    """Have a fresh process load the folder; return its answers to the samples and its findings."""
    scratch = folder.with_name("check")
    shutil.rmtree(scratch, ignore_errors=True)
    samples, order = scratch / "samples.safetensors", scratch / "order.json"
    write_tensors(samples, {f"{i:04d}": ids for i, ids in enumerate(expected.samples)})
    device = str(job.runner.device)
    asked = Order(
        str(folder.absolute()),
        str(job.model.folder.absolute()),
        plan.parameters_before,
        str(samples.absolute()),
        expected.positions,
        torch.get_num_threads(),
        device,
    )
    write_json(order, asdict(asked))
    fresh_process(order.absolute())
    answers = load_file(scratch / ANSWERS)
    findings = json.loads((scratch / FINDINGS).read_text(encoding="utf-8"))
    shutil.rmtree(scratch)
    return [found for _, found in sorted(answers.items())], findings


def fresh_process(order: Path) -> None:
    """Run `eckart.methods.reload` on an order, with this process's interpreter and packages.

    Raises:
        BrokenOutputError: if it cannot load the folder, with its last words.
        EckartError: if it ended for any other reason; nothing is known of the folder then.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "eckart.methods.reload", str(order)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
    if done.returncode > 0 and order.with_name(LOADING).exists():
        raise _broken(f"a fresh process cannot load it ({words})")
    reason = f"({words})" if done.returncode > 0 else f"by signal {-done.returncode}, as happens where memory runs out"
    raise EckartError(
        f"the process that checks the output was ended {reason}; what is finished is kept: run the same command again, "
        "or with --no-check"
    )
