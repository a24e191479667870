"""What the tensors of a fine-tuned model are made of, and what every difference may become."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from eckart.budget import DENSE, Candidates, Option
from eckart.files.delta import Change, compact, map_tensors, matrix_shape, stored_nbytes
from eckart.files.folder import TensorFile
from eckart.fit import Metric, error_of, regress
from eckart.fit.regression import NUMERICAL_RANK
from eckart.fit.residual import HALF, Terms, allocations, blank_full, blank_terms, fit_full, fit_terms, noise
from eckart.hosts import is_conv1d
from eckart.maps import LinearMap
from eckart.methods.compress.job import Request, open_job, statistics_store
from eckart.methods.compress.layers import Known, Layer, layers_of
from eckart.progress import Progress
from eckart.stats import Store, collect_gradients, collect_inputs

# Entries that share a scale.
GROUP = 512
# Scales and zero points have the range of float32 in two bytes.
SCALES = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor that changed and that of the base it starts from, as matrices.

    Attributes:
        name: its name in the tuned model.
        origin: that of the base's tensor.
        rows: how many of its rows start from there; None for all.
        shape: sizes (m, n) of their matrix.
        dtype: of the tuned tensor.
    """

    name: str
    origin: str
    rows: int | None
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def change(self) -> Change:
        """What it is made of if no difference is stored."""
        return Change(_dtype_name(self.dtype), self.origin, self.rows)


@dataclass(frozen=True, slots=True)
class Choices:
    """What one pair may become.

    Attributes:
        pair: the pair.
        table: the options; their numbers are bytes.
        made: terms, or bits of the full difference, by structure.
        weights: squared Frobenius norm of the larger of the two matrices.
        relative: that of the difference over it.
        own: whether the errors are under the layer's own metric.
        factor: from its errors to the unit of all.
    """

    pair: Pair
    table: Candidates
    made: Mapping[str, Terms | int]
    weights: float
    relative: float
    own: bool
    factor: float = 1.0


class Fisher:
    """The Fisher metric of the tuned model's layers, by the names of their tensors."""

    def __init__(self, request: Request, cache: bool, scratch: Path, progress: Progress) -> None:
        job = open_job(request, progress)
        store, count = statistics_store(job, None if cache else scratch), len(job.parts.blocks)
        if not (store.has("inputs", count) and store.has(f"ends-{job.objective.name}", 1)):
            ends, texts = Store(scratch / "boundaries"), job.calibration
            collect_inputs(job.runner, texts, store, boundaries=ends, progress=progress)
            collect_gradients(job.runner, texts, job.objective, store, ends, seed=request.seed, progress=progress)
        self.known = Known(job, store)
        self.layers: dict[str, Layer] = {job.model.names[f"{x.name}.weight"]: x for x in layers_of(job)}

    def metric(self, pair: Pair, weight: Tensor) -> Metric | None:
        """Return the metric of a tensor's difference in nats; None if it is no layer's, or no text reached it."""
        layer = self.layers.get(pair.name)
        if layer is None:
            return None
        turned = is_conv1d(self.known.job.model.model.get_submodule(layer.name))
        metric = self.known.metric(layer, weight.mT if turned else weight)
        if metric is None:
            return None
        inputs, outputs = (None if moment is None else moment.cpu() for moment in (metric.inputs, metric.outputs))
        if turned:
            inputs, outputs = outputs, inputs
        if outputs is not None:
            outputs = outputs[(slice(pair.shape[0]),) * outputs.ndim] * self.known.scale()
        return Metric(inputs=inputs, outputs=outputs)


class Job:
    """Two models, tensor by tensor, and what is to be stored of their differences.

    Args:
        base: tensors of the base.
        tuned: tensors of the tuned model.
        bits: what terms may have.
        fisher: the metric; None for errors relative to the weights.
    """

    def __init__(self, base: TensorFile, tuned: TensorFile, bits: tuple[int, ...], fisher: Fisher | None) -> None:
        self.base, self.tuned, self.bits, self.fisher = base, tuned, bits, fisher

    def difference(self, pair: Pair) -> tuple[Tensor, Metric, bool]:
        """Return D (m, n) float64, its metric, and whether that is the layer's own."""
        weight = self.tuned.read(pair.name)[: pair.rows].reshape(pair.shape)
        metric = None if self.fisher is None else self.fisher.metric(pair, weight.float())
        origin = self.base.read(pair.origin)[: pair.rows].reshape(pair.shape)
        return weight.double() - origin.double(), metric or Metric(), metric is not None

    def choices(self, pair: Pair) -> Choices:
        """Return what a pair may become."""
        target, metric, own = self.difference(pair)
        weights = self.tuned.read(pair.name)[: pair.rows].reshape(pair.shape).double()
        solved = regress(target, metric)
        floor = max(self._rounding(pair, weights, metric), NUMERICAL_RANK * solved.total)
        before = max(float(solved.errors()[0]) - floor, 0.0)
        options, made = [Option("base", 0, 0, 0, before)], dict[str, Terms | int]()

        def add(structure: str, rank: int, what: Terms | int, error: float) -> None:
            nbytes = _cost(pair.name, _blank(pair.shape, what))
            options.append(Option(structure, rank, nbytes, nbytes, max(error - floor, 0.0)))
            made[structure] = what

        if before > 0:
            noises = {bits: noise(target, solved, bits, GROUP, SCALES) for bits in self.bits}
            for terms, error in allocations(solved, noises):
                add(_words(terms), sum(rank for _, rank in terms), terms, error)
            for bits in (b for b in self.bits if b < HALF):
                shown = fit(target, metric, bits).to(torch.float64).dense()
                add(f"full int{bits}", min(pair.shape), bits, error_of(target, shown, metric))
        whole = _exact_cost(pair.name, pair.shape, pair.dtype)
        options = sorted((o for o in options if o.numbers < whole), key=lambda o: (o.numbers, o.loss))
        options.append(Option(DENSE, min(pair.shape), whole, whole, 0.0))
        table = Candidates(pair.name, pair.shape, tuple(options))
        energy = max(float(weights.square().sum()), float((weights - target).square().sum()))
        return Choices(pair, table, made, energy, float(target.square().sum()) / energy, own)

    def _rounding(self, pair: Pair, weights: Tensor, metric: Metric) -> float:
        """Return the error expected of rounding the weights to the coarser of the two dtypes."""
        coarse = max(torch.finfo(pair.dtype).eps, torch.finfo(self.base.dtype(pair.origin)).eps)
        squares = weights.square()
        for moment, axis in ((metric.inputs, 1), (metric.outputs, 0)):
            if moment is not None:
                diagonal = moment.diagonal() if moment.ndim == 2 else moment
                squares = squares * diagonal.unsqueeze(1 - axis)
        return float(squares.sum()) * coarse**2 / 12


def sorted_out(
    job: Job, base_lines: Mapping[str, str], lines: Mapping[str, str]
) -> tuple[dict[str, Change], list[Pair], dict[str, Tensor]]:
    """Return what every tensor is made of if no difference is stored, the pairs, and what is stored in any case."""
    changes, pairs, exact = dict[str, Change](), list[Pair](), dict[str, Tensor]()
    for name, line in lines.items():
        dtype = job.tuned.dtype(name)
        tensor = job.tuned.read(name)
        if base_lines.get(name) == line or _is_rounded(job.base, name, tensor):
            changes[name] = Change(_dtype_name(dtype), name)
            continue
        origin = _origin(job.base, name, tensor)
        if origin is None:
            changes[name], exact[name] = Change(_dtype_name(dtype)), tensor
            continue
        start = job.base.read(origin)
        rows = None if start.shape == tensor.shape else min(start.shape[0], tensor.shape[0])
        changes[name] = Change(_dtype_name(dtype), origin, rows)
        if rows is not None:
            exact[f"{name}.rows"] = tensor[rows:].clone()
        if not _same_bits(start[:rows].to(dtype), tensor[:rows]):
            pairs.append(Pair(name, origin, rows, matrix_shape(tuple(tensor[:rows].shape)), dtype))
    return changes, pairs, exact


def _is_rounded(base: TensorFile, name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor is the base's in another floating dtype."""
    if name not in base or base.shape(name) != tuple(tensor.shape) or not tensor.is_floating_point():
        return False
    return base.dtype(name).is_floating_point and _same_bits(base.read(name).to(tensor.dtype), tensor)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same in storage; 0 and -0 are not."""
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def _origin(base: TensorFile, name: str, tensor: Tensor) -> str | None:
    """Return the tensor of the base that a matrix starts from, None for one that has to be stored whole.

    That of its name if only the number of rows differs; else, for a head that is no longer tied for instance, the
    nearest of its shape that is nearer than zero.
    """
    if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    if name in base:
        shape = base.shape(name)
        fits = shape[1:] == tuple(tensor.shape[1:]) and base.dtype(name).is_floating_point and math.prod(shape) > 0
        return name if fits else None
    least, nearest = float(tensor.double().square().sum()), None
    for other in sorted(base.files):
        if base.shape(other) == tuple(tensor.shape) and base.dtype(other).is_floating_point:
            distance = float((tensor.double() - base.read(other).double()).square().sum())
            if distance < least:
                least, nearest = distance, other
    return nearest


def tables(job: Job, pairs: list[Pair], progress: Progress) -> list[Choices]:
    """Return what every pair may become, all errors in one unit.

    Where no metric is known an error counts relative to the weights, and like the mean of the others where some are.
    """
    out = []
    for i, pair in enumerate(pairs):
        progress("plan", i, len(pairs))
        out.append(job.choices(pair))
    progress("plan", len(pairs), len(pairs))
    known = [choices for choices in out if choices.own]
    relative = sum(choices.relative for choices in known)
    usual = sum(choices.table.options[0].loss for choices in known) / relative if relative > 0 else 1.0
    return [choices if choices.own else _scaled(choices, usual / choices.weights) for choices in out]


def _scaled(choices: Choices, factor: float) -> Choices:
    return replace(choices, table=choices.table.scaled(factor), factor=factor)


def fit(target: Tensor, metric: Metric, what: Terms | int) -> LinearMap:
    """Return the map of a difference: its terms, or all of it as codes of that many bits."""
    if isinstance(what, int):
        return fit_full(target, metric, what, GROUP, SCALES)
    return fit_terms(target, metric, what, GROUP, SCALES)


def _blank(shape: tuple[int, int], what: Terms | int) -> LinearMap:
    return blank_full(shape, what, GROUP, SCALES) if isinstance(what, int) else blank_terms(shape, what, GROUP, SCALES)


def _words(terms: Terms) -> str:
    return "lowrank " + " + ".join(f"{rank}x{bits} bit" for bits, rank in terms)


def _cost(name: str, map_: LinearMap) -> int:
    """Return the bytes that a map adds to both files."""
    return stored_nbytes(map_tensors(name, map_)) + len(compact({"map": map_.spec()}))


def _exact_cost(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return stored_nbytes({name: torch.empty(shape, dtype=dtype, device="meta")})


def exact_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
