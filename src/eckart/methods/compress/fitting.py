"""Fitting one layer at the rank its plan says, stored as its recipe says."""

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn

from eckart.budget import DENSE, Option
from eckart.errors import EckartError
from eckart.fit import Coding, Fit, Metric, best_bias, coded, error_of, regress
from eckart.fit.families import Family
from eckart.fit.refit import refit_up
from eckart.hosts import EmbeddingHost, TiedHead, embedding_host, host
from eckart.maps import Dense, LinearMap, LowRank, stored
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import EMBEDDING, Known, Layer
from eckart.stats import CrossMoments

# Allowed relative excess of a layer's error over the optimum, where the randomized solver is faster.
ACCURACY = 1e-3


def fit_layer(
    job: Job,
    known: Known,
    layer: Layer,
    weight: Tensor,
    option: Option,
    *,
    bias: Tensor | None = None,
    cross: CrossMoments | None = None,
    dtype: torch.dtype | None = None,
) -> Fit:
    """Fit a layer at the rank of an option.

    Args:
        job: the job.
        known: its statistics.
        layer: the layer.
        weight: W (out, in), float32.
        option: what it becomes.
        bias: its own bias.
        cross: moments of what it sees in the compressed model, in a sequential pass.
        dtype: dtype of the numbers; None for that of the stored weight.

    Returns:
        The fit; its map is rounded to the dtype. `loss_of` turns its error into the plan's unit.
    """
    recipe, dtype = job.recipe, dtype or job.weight_dtype(layer.name)
    metric, dense = known.metric(layer, weight, cross if recipe.sequential else None), option.structure == DENSE
    if metric is None and not dense:
        raise EckartError(f"the calibration texts never reach {layer.name}, so it cannot be fitted")
    metric = metric or Metric()
    if dense:
        fit = Fit(Dense(weight), bias, 0.0, 0.0)
    else:
        kept = dtype if recipe.coding is None else torch.float64
        fit = _fit_structure(job, layer, weight, metric, option, bias, cross, kept)
    if recipe.coding is None:
        return fit
    return _as_codes(fit, weight, metric, recipe.coding, bias, dtype, table=by_rows(job, layer))


def _fit_structure(
    job: Job,
    layer: Layer,
    weight: Tensor,
    metric: Metric,
    option: Option,
    bias: Tensor | None,
    cross: CrossMoments | None,
    dtype: torch.dtype,
) -> Fit:
    recipe = job.recipe
    family = recipe.family(option.structure)
    if family is not None:
        return _fit_family(weight, metric, family, option.rank, bias, dtype)
    regression = regress(weight, metric, rank=option.rank, accuracy=ACCURACY)
    if not recipe.update and layer.kind != EMBEDDING:
        return regression.fit(option.rank, recipe.storage, dtype, bias)
    fit = regression.fit(option.rank, "lowrank", torch.float64, bias)
    factors = cast(LowRank, fit.map)
    if recipe.update and cross is not None:
        factors = refit_up(weight, factors, cross.shifted.second)
    built = stored(factors, recipe.storage, table=layer.kind == EMBEDDING)
    return dataclasses.replace(fit, map=built.to(dtype), bias=None if fit.bias is None else fit.bias.to(dtype))


def _fit_family(
    weight: Tensor, metric: Metric, family: Family, size: int, bias: Tensor | None, dtype: torch.dtype
) -> Fit:
    map_ = family.fit(weight, metric, size)
    errors, rounded = _errors(weight, map_, metric), map_.to(dtype)
    change = best_bias(weight, rounded, metric)
    offset = bias if change is None else change if bias is None else bias.double() + change
    return Fit(rounded, None if offset is None else offset.to(dtype), *errors)


def _errors(weight: Tensor, map_: LinearMap, metric: Metric) -> tuple[float, float]:
    """Return the error of a map, and its share of that of the zero map."""
    error = error_of(weight, map_.to(torch.float64).dense(), metric)
    zero = error_of(weight, torch.zeros_like(weight), metric)
    return error, error / zero if zero > 0 else 0.0


def _as_codes(
    fit: Fit, weight: Tensor, metric: Metric, coding: Coding, bias: Tensor | None, dtype: torch.dtype, *, table: bool
) -> Fit:
    """Return a fit with its numbers stored as codes, and the error it then has."""
    map_ = coded(fit.map, weight, metric, coding, dtype, table=table)
    change = None if isinstance(fit.map, Dense) else best_bias(weight, map_, metric)
    offset = bias if change is None else change if bias is None else bias.double() + change
    return Fit(map_, None if offset is None else offset.to(dtype), *_errors(weight, map_, metric))


def loss_of_map(job: Job, known: Known, layer: Layer, weight: Tensor, map_: LinearMap) -> float:
    """Return the predicted loss of a layer whose codes were learned, in the unit of its job's plan."""
    return loss_of(known, Fit(map_, None, *_errors(weight, map_, known.metric(layer, weight) or Metric())))


def by_rows(job: Job, layer: Layer) -> bool:
    """Tell whether groups must run along rows: those of an embedding are looked up, and learned codes expect it."""
    return layer.kind == EMBEDDING or job.recipe.scale_rank > 0


def structure_name(option: Option, coding: Coding | None) -> str:
    """Return what a plan calls an option: "pivoted", "pivoted int4", "int4" for a dense matrix of codes."""
    return option.structure if coding is None else coded_name(option.structure, coding)


def coded_name(structure: str, coding: Coding) -> str:
    """Return what a plan calls a structure whose numbers are codes."""
    return f"int{coding.bits}" if structure == DENSE else f"{structure} int{coding.bits}"


def loss_of(known: Known, fit: Fit) -> float:
    """Return a fit's predicted loss in the unit of its job's plan."""
    return fit.error * known.scale() if known.job.recipe.output_metric else fit.relative


def running(fit: Fit) -> nn.Module:
    """Return a fitted layer as a module that computes in float32 with its rounded numbers."""
    return host(fit.map.to(torch.float32), None if fit.bias is None else fit.bias.float())


def running_embedding(job: Job, fit: Fit) -> EmbeddingHost:
    """Return a fitted embedding as a module that computes in float32 with its rounded numbers."""
    name = job.parts.embedding or ""
    padding = cast("int | None", job.model.model.get_submodule(name).padding_idx)
    return embedding_host(fit.map.to(torch.float32), padding)


def tied_head(job: Job, embedding: EmbeddingHost) -> dict[str, nn.Module]:
    """Return the head that goes with a compressed embedding, by name; empty if the head is not tied to it."""
    if not job.parts.tied or job.parts.head is None:
        return {}
    bias = f"{job.parts.head}.bias"
    held = job.model.read(bias).to(job.runner.device, torch.float32) if bias in job.model.names else None
    return {job.parts.head: TiedHead(embedding, held)}
