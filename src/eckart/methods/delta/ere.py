"""ERE: a fine-tuned model stored as its base plus low-rank, quantized differences, with ranks from one budget.

    D = W_tuned - W_base,    D' = sum_t Q_bt(U_t) Q_bt(V_t),    min over ranks, bits of  sum E(D - D')  in B bytes

Structure: per matrix nothing, low-rank terms as codes, all of D as codes, or W_tuned as it is; U is fitted again to V
as rounded, with errors fed back (fit/coded.py), and every term to what those before it left (fit/residual.py). Metric:
squared error relative to the weights; with a text, the Fisher metric of the tuned model, E[g g^T] on the left and
E[x x^T] on the right, in which errors are nats and layers compare. Budget: knapsack in bytes over ranks and bits; all
files count. Solver: closed form. Trained: nothing. An error below that of rounding the weights counts as none.

Source: "Efficient storage of fine-tuned models via low-rank approximation of weight residuals" (ERE): residuals, ranks
by layer, quantized factors. The metric, bits by component and the budget in bytes are ours.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from eckart.atomic import appearing, check_output
from eckart.budget import DENSE, Option, knapsack
from eckart.errors import EckartError
from eckart.files.delta import (
    CARRIED,
    FORMAT,
    Change,
    delta_text,
    file_hash,
    fingerprint,
    lacking,
    line_of,
    lines_of,
    map_tensors,
    restored,
    stored_nbytes,
    write_delta,
)
from eckart.files.folder import check_model_folder, tensor_file
from eckart.fit import error_of
from eckart.methods.compress.job import Request
from eckart.methods.compress.limits import parse_size
from eckart.methods.delta.choices import Choices, Fisher, Job, exact_bytes, fit, sorted_out, tables
from eckart.methods.delta.outcome import Delta, TensorDelta
from eckart.progress import Progress, silent

# Bits that may be asked for; components choose among the first where none are.
MIXED, BITS = (2, 3, 4, 8), (4, 8, 16)
USUAL_KEEP = 0.1
NATS, RELATIVE = "nats per token, predicted", "squared error relative to the weights"


def delta(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    keep: float | None = None,
    bytes: int | str | None = None,
    bits: int | None = None,
    calibration: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    cache: bool = True,
    progress: Progress = silent,
) -> Delta:
    """Store a fine-tuned model as its difference from a base, from which `restore` makes it again.

    Args:
        base: folder of the base.
        tuned: folder of the fine-tuned model.
        out: folder to write; must not hold anything yet.
        keep: bytes of all files as a share of those of the tuned model's tensors, in (0, 1]; 0.1 by default.
        bytes: the same as whole number, or text with a unit ("20MB" decimal, "20MiB" binary), instead of `keep`.
        bits: 4, 8 or 16 (no codes) for all factors; by default every component gets 2, 3, 4 or 8 of them.
        calibration: text like that the model was tuned on; without, errors are those of the weights alone.
        samples: calibration samples; 128 windows by default, or what the text has.
        length: tokens per sample, 256 by default.
        seed: seed of everything random.
        cache: whether to keep statistics for later runs.
        progress: called with (stage, steps done, steps in all).

    Raises:
        EckartError: for bad input of any kind, or a budget that cannot be met; nothing is written then.
    """
    base, tuned, out, text = Path(base), Path(tuned), Path(out), None if calibration is None else Path(calibration)
    nbytes = None if bytes is None else parse_size(bytes)
    _check(base, tuned, out, keep, nbytes, bits)
    origin, own = tensor_file(base), tensor_file(tuned)
    base_lines, lines = lines_of(origin, progress, finite=True), lines_of(own, progress, finite=True)
    given = {"keep": keep, "bytes": nbytes, "bits": bits, "samples": samples, "length": length, "seed": seed}
    made_by = {"method": "ere", "tuned": tuned.name, "calibration": text and text.name, **given}
    facts = {"base": {"name": base.name, "sha256": fingerprint(base_lines.values())}, "made_by": made_by}
    with TemporaryDirectory(prefix="eckart-") as scratch:
        request = Request(tuned, "eckart", 1.0, text, samples, length, seed, {})
        fisher = None if text is None else Fisher(request, cache, Path(scratch), progress)
        job = Job(origin, own, (bits,) if bits else MIXED, fisher)
        changes, pairs, exact = sorted_out(job, base_lines, lines)
        companions = {name: tuned / name for name in CARRIED if (tuned / name).is_file()}
        size = sum(exact_bytes(own.shape(name), own.dtype(name)) for name in own.files)
        limit = nbytes or math.floor((keep or USUAL_KEEP) * size)
        left = limit - _fixed(changes, exact, companions, base, facts, limit)
        choices = tables(job, pairs, progress)
        chosen = knapsack([each.table for each in choices], left)
        rows = _stored(job, choices, chosen, changes, exact, lines, progress)
    facts["restored"] = fingerprint(lines.values())
    with appearing(out) as temporary:
        write_delta(temporary, changes, exact, companions, base, facts)
        written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    table = tuple(rows.get(name) or _row(name, own.shape(name), changes[name], exact) for name in changes)
    return Delta(out, size, written, RELATIVE if fisher is None else NATS, table)


def _check(base: Path, tuned: Path, out: Path, keep: float | None, nbytes: int | None, bits: int | None) -> None:
    """Raise an `EckartError` for anything wrong that can be known without reading a weight."""
    check_output(out)
    if keep is not None and nbytes is not None:
        raise EckartError("give the budget either as keep or as a number of bytes, not both")
    if keep is not None and not 0.0 < keep <= 1.0:
        raise EckartError(f"keep is the share of the tuned model's bytes and must lie in (0, 1], got {keep!r}")
    if bits is not None and bits not in BITS:
        raise EckartError(f"bits must be one of {', '.join(map(str, BITS))}, or left out for a mixture, got {bits}")
    for folder in (base, tuned):
        if check_model_folder(folder).get("quantization_config"):
            raise EckartError(f"{folder} is compressed or quantized; differences are of models with plain weights")


def _fixed(
    changes: Mapping[str, Change],
    exact: Mapping[str, Tensor],
    companions: Mapping[str, Path],
    base: Path,
    facts: Mapping[str, Any],
    limit: int,
) -> int:
    """Return the bytes that all files take if no difference is stored.

    Raises:
        EckartError: if that is beyond the budget.
    """
    hashes = {name: file_hash(path) for name, path in companions.items()}
    own = sum(companions[name].stat().st_size for name in lacking(hashes, base))
    blank = {**facts, "format": FORMAT, "companions": hashes, "weights": "0" * 64, "restored": "0" * 64}
    # Beside the tensors' entries: the length of the header, its metadata, and what aligns it.
    fixed = len(delta_text(changes, blank)) + own + stored_nbytes(exact) + 64
    if fixed > limit:
        largest = max(exact, key=lambda name: exact[name].nbytes, default="the list of tensors")
        raise EckartError(
            f"{limit:,} bytes cannot be met: what has to be stored whole takes {fixed:,}, the most of it {largest}; "
            "allow more bytes"
        )
    return fixed


def _stored(
    job: Job,
    table: list[Choices],
    chosen: Mapping[str, Option],
    changes: dict[str, Change],
    exact: dict[str, Tensor],
    lines: dict[str, str],
    progress: Progress,
) -> dict[str, TensorDelta]:
    """Fit what was chosen; add it to what is stored, and replace the lines of the tensors it changes."""
    rows = {}
    for i, choices in enumerate(table):
        progress("fit", i, len(table))
        pair, option = choices.pair, chosen[choices.pair.name]
        target, metric, _ = job.difference(pair)
        shown, tensors = torch.zeros_like(target), dict[str, Tensor]()
        if option.structure == DENSE:
            shown = target
            exact.pop(f"{pair.name}.rows", None)
            changes[pair.name], tensors = Change(pair.change.dtype), {pair.name: job.tuned.read(pair.name)}
        elif option.structure in choices.made:
            map_ = fit(target, metric, choices.made[option.structure])
            shown, tensors = map_.to(torch.float64).dense(), map_tensors(pair.name, map_)
            changes[pair.name] = replace(pair.change, map=map_.spec())
        exact.update(tensors)
        lines[pair.name] = line_of(pair.name, restored(pair.name, changes[pair.name], job.base, exact.__getitem__))
        errors = (choices.factor * error_of(target, kept, metric) for kept in (torch.zeros_like(target), shown))
        structure = "exact" if option.structure == DENSE else option.structure
        nbytes, shape = sum(t.nbytes for t in tensors.values()), job.tuned.shape(pair.name)
        rows[pair.name] = TensorDelta(pair.name, shape, structure, nbytes, *errors)
    progress("fit", len(table), len(table))
    return rows


def _row(name: str, shape: tuple[int, ...], change: Change, exact: Mapping[str, Tensor]) -> TensorDelta:
    """Return what is said of a tensor that had no choice."""
    held = exact.get(name if change.base is None else f"{name}.rows")
    structure = "exact" if change.base is None else "same"
    return TensorDelta(name, shape, structure, 0 if held is None else held.nbytes, 0.0, 0.0)
