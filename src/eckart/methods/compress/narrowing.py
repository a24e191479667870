"""Fitting layers that become narrower together: around fewer hidden units, or around heads of fewer channels.

The layers around hidden units become narrow dense layers. A class of transformers reshapes by one head size and rotates
all channels of a head, so the layers around heads keep their outer sizes: the numbers are those of the narrow matrices,
whose rows are placed among zeros (`Placement`) and whose columns read some channels (`Selection`).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eckart.budget import DENSE, Candidates, Option
from eckart.errors import EckartError
from eckart.files.neurons import COLUMNS, ROWS, neurons_entry
from eckart.fit import Fit, Metric, coded, error_of, regress
from eckart.fit.families import SHARES
from eckart.fit.heads import ValuesFit, choose_channels, fit_values, output_moments
from eckart.fit.neurons import fit_neurons, neurons_fitter
from eckart.hosts import Heads
from eckart.maps import Dense, LinearMap, Placement, Product, Selection
from eckart.methods.compress.fitting import loss_of
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import (
    INDEX,
    Known,
    Layer,
    bias_of,
    layer_candidates,
    map_loss,
    predicted,
    sets_of,
    weights,
)
from eckart.stats import CrossMoments, Moments


@dataclass(frozen=True, slots=True)
class Narrowed:
    """One of the layers around hidden units or heads, with fewer of their channels.

    Attributes:
        layer: the layer.
        fit: its map and bias; the error is with the layer that reads the units, or the outputs of the heads.
        entry: what its entry in config.json says of hidden units; None around heads.
    """

    layer: Layer
    fit: Fit
    entry: dict[str, Any] | None = None


def narrower_sets(job: Job, layers: list[Layer], known: Known) -> list[tuple[Layer, Candidates]]:
    """Return the sets of layers around hidden units, with the numbers of units they may have and what each loses.

    The loss is that of the layer that reads the units, under its whole metric, and so in the unit of maps of layers:
    what writes the units that stay is not changed.

    Args:
        job: the job.
        layers: its layers, one by one.
        known: their statistics.
    """
    out = []
    for layer, reader in weights(job, sets_of(job, layers)):
        metric, found = known.metric(layer, reader), layer_candidates(job, layer, None)
        if metric is None or len(found.options) == 1:
            continue
        fit = neurons_fitter(reader, metric, ridge=job.recipe.ridge)
        nearest = {min(found.options[:-1], key=lambda o: abs(o.rank - share * layer.units)) for share in SHARES}
        offered = sorted(nearest, key=lambda option: option.rank)
        lossy = [replace(option, loss=fit(option.rank).error * known.scale()) for option in offered]
        out.append((layer, replace(found, options=(*lossy, found.dense))))
    return out


def fit_narrowed(
    job: Job, known: Known, layer: Layer, option: Option, *, cross: CrossMoments | None = None
) -> list[Narrowed]:
    """Fit the layers around hidden units or heads with fewer of their channels.

    Args:
        job: the job.
        known: its statistics.
        layer: the hidden units or heads.
        option: how many units, or channels per head, remain.
        cross: moments of hidden units in the compressed model, in a sequential pass.
    """
    dense = {member.name: weight for member, weight in weights(job, list(layer.members))}
    biases = {name: bias_of(job, name) for name in dense}
    if layer.heads is not None:
        return _fit_heads(job, known, layer, layer.heads, option.rank, dense, biases)
    reader = dense.pop(layer.name)
    metric = known.metric(layer, reader, cross if job.recipe.sequential else None)
    if metric is None:
        raise _unreached(layer)
    fit = fit_neurons(reader, metric, option.rank, ridge=job.recipe.ridge)
    kept, out = fit.kept, []
    for writer in layer.writers:
        bias, rows = biases[writer.name], dense[writer.name][kept]
        made = _stored(job, writer, rows, _rows_metric(job, known, writer, dense[writer.name], kept))
        made = replace(made, bias=None if bias is None else bias[kept].to(made.map.dtype))
        out.append(Narrowed(writer, made, neurons_entry(layer.name, ROWS, layer.shape[1])))
    seen = None if metric.seen is None else metric.seen[kept][:, kept]
    made = _stored(job, layer, fit.weight, Metric(inputs=seen, outputs=metric.outputs))
    # W' is the least-squares solution, so that what rounding adds to its error is the error of rounding it
    zero, bias = error_of(reader, torch.zeros_like(reader), metric), biases[layer.name]
    own, rounding = None if bias is None else bias.to(made.map.dtype), made.error / zero if zero > 0 else 0.0
    made = Fit(made.map, own, fit.error + made.error, fit.relative + rounding)
    return [*out, Narrowed(layer.members[-1], made, neurons_entry(layer.name, COLUMNS, layer.shape[1]))]


def _stored(job: Job, layer: Layer, matrix: Tensor, metric: Metric | None) -> Fit:
    """Return a narrow matrix as it is stored, as codes if the recipe has them, and what rounding to these costs.

    Args:
        job: the job.
        layer: the layer that the matrix is of.
        matrix: float32 or float64.
        metric: of what the narrow layer reads and writes; only read for codes.
    """
    dtype, coding = job.weight_dtype(layer.name), job.recipe.coding
    if coding is None or metric is None:
        return Fit(Dense(matrix.to(dtype)), None, 0.0, 0.0)
    map_ = coded(Dense(matrix), matrix, metric, coding, dtype)
    error = error_of(matrix, map_.to(torch.float64).dense(), metric)
    zero = error_of(matrix, torch.zeros_like(matrix), metric)
    return Fit(map_, None, error, error / zero if zero > 0 else 0.0)


def _rows_metric(job: Job, known: Known, layer: Layer, weight: Tensor, rows: Tensor) -> Metric | None:
    """Return the metric of some rows of a layer on its original inputs, for codes; None if nothing is coded."""
    if job.recipe.coding is None:
        return None
    metric = known.metric(layer, weight)
    if metric is None:
        raise _unreached(layer)
    outputs = metric.outputs
    if outputs is not None:
        outputs = outputs[rows][:, rows] if outputs.ndim == 2 else outputs[rows]
    return Metric(inputs=metric.seen, outputs=outputs)


def _fit_heads(
    job: Job,
    known: Known,
    layer: Layer,
    heads: Heads,
    count: int,
    dense: dict[str, Tensor],
    biases: dict[str, Tensor | None],
) -> list[Narrowed]:
    """Fit the layers around heads with `count` channels per head."""
    writers = [writer.name for writer in layer.writers]
    weight = torch.cat([dense[name] for name in writers])
    given = {name: weight.new_zeros(dense[name].shape[0]) for name in writers}
    given |= {name: bias for name in writers if (bias := biases[name]) is not None}
    bias = torch.cat([given[name] for name in writers])
    q, k, v = (
        _Rows(*part)
        for part in zip(
            weight.split(heads.rows),
            bias.split(heads.rows),
            _inputs(known, layer, dense),
            (heads.queries, heads.keys, heads.keys),
            strict=True,
        )
    )
    kept = choose_channels(q.moments(), k.moments(), heads.units, count)
    values = fit_values(v.weight, v.bias, dense[layer.name], v.moments(), count)
    first = torch.arange(count, device=kept.device)
    by_head = (kept.repeat_interleave(heads.queries // heads.keys, 0), kept, first.expand(heads.keys, -1))
    at_q, at_k, at_v = (_places(channels, heads.size) for channels in by_head)
    rows = torch.cat((at_q, at_k + heads.rows[0], at_v + sum(heads.rows[:2])))
    narrow = torch.cat((q.weight[at_q].double(), k.weight[at_k].double(), values.weight))
    offset = torch.zeros_like(bias)
    offset[rows] = torch.cat((q.bias[at_q], k.bias[at_k], values.bias.to(bias.dtype)))
    out, start = [], 0
    for writer in layer.writers:
        inside = (rows >= start) & (rows < start + writer.shape[0])
        placement = Placement((rows[inside] - start).to(INDEX), writer.shape[0])
        own = None if biases[writer.name] is None else offset[start : start + writer.shape[0]]
        at = rows[inside] - start
        made = _stored(job, writer, narrow[inside], _rows_metric(job, known, writer, dense[writer.name], at))
        out.append(_narrowed(job, writer, Product((placement, made.map)), own, made.error, made.relative))
        start += writer.shape[0]
    read = _places(first.expand(heads.queries, -1), heads.size)
    made = _stored(job, layer, values.out, _outputs_metric(job, known, layer, dense[layer.name], values))
    reader = Product((made.map, Selection(read.to(INDEX), layer.shape[1])))
    errors = values.error + made.error, values.relative + made.relative
    return [*out, _narrowed(job, layer.members[-1], reader, biases[layer.name], *errors)]


def _outputs_metric(job: Job, known: Known, layer: Layer, weight: Tensor, values: ValuesFit) -> Metric | None:
    """Return the metric of the layer that reads the narrow outputs of heads, for codes; None if nothing is coded.

    Outputs of a head are means of its values, so those of the projected values are the projected outputs.
    """
    if job.recipe.coding is None:
        return None
    metric = known.metric(layer, weight)
    if metric is None:
        raise _unreached(layer)
    heads = weight.shape[1] // values.projectors.shape[2]
    projectors = values.projectors.repeat_interleave(heads // values.projectors.shape[0], 0)
    whole = torch.block_diag(*projectors)
    return Metric(inputs=None if metric.seen is None else whole @ metric.seen @ whole.mT, outputs=metric.outputs)


def _narrowed(
    job: Job, layer: Layer, map_: LinearMap, bias: Tensor | None, error: float = 0.0, relative: float = 0.0
) -> Narrowed:
    dtype = job.weight_dtype(layer.name)
    return Narrowed(layer, Fit(map_.to(dtype), None if bias is None else bias.to(dtype), error, relative))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of queries, keys or values: their weights, biases, inputs, and how many heads they are of."""

    weight: Tensor
    bias: Tensor
    inputs: Moments
    heads: int

    def moments(self) -> Tensor:
        """Return the second moment of every head."""
        return output_moments(self.weight, self.bias, self.inputs.mean, self.inputs.second, self.heads)


def _inputs(known: Known, layer: Layer, dense: dict[str, Tensor]) -> list[Moments]:
    """Return the moments of what queries, keys and values are made of."""
    out = []
    for writer in layer.writers:
        data = known.data(writer, dense[writer.name])
        if data is None or data.inputs is None:
            raise _unreached(layer)
        out.append(data.inputs)
    return out if len(out) == 3 else out * 3


def _places(channels: Tensor, size: int) -> Tensor:
    """Return places among the rows of all heads, given the channels (heads, count) of each."""
    return (channels + size * torch.arange(channels.shape[0], device=channels.device)[:, None]).flatten()


def _unreached(layer: Layer) -> EckartError:
    return EckartError(f"the calibration texts never reach {layer.name}, so it cannot be fitted")


def narrowed_loss(job: Job, known: Known, layer: Layer, option: Option) -> float:
    """Return the predicted loss of layers that become narrower together, in the unit of the job's plan."""
    return sum(loss_of(known, part.fit) for part in fit_narrowed(job, known, layer, option))


def foreseen(job: Job, layers: list[Layer], known: Known, chosen: dict[str, Option]) -> dict[str, Option]:
    """Return chosen options with their predicted losses, which an allocation did without."""
    out = dict(chosen)
    for layer, weight in weights(job, layers):
        option = chosen[layer.name]
        metric = None if option.structure == DENSE else known.metric(layer, weight)
        if metric is None:
            continue
        family = job.recipe.family(option.structure)
        if layer.writers:
            loss = narrowed_loss(job, known, layer, option)
        elif family is None:
            loss = float(predicted(known, regress(weight, metric))[option.rank])
        else:
            loss = map_loss(job, known, weight, metric, family.fit(weight, metric, option.rank))
        out[layer.name] = replace(option, loss=loss)
    return out
