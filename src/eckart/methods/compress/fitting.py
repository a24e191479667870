"""Fitting one layer at the rank its plan says, stored as its recipe says."""

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn

from eckart.budget import Option
from eckart.errors import EckartError
from eckart.fit import Fit, Metric, best_bias, error_of, regress
from eckart.fit.families import Family
from eckart.fit.refit import refit_up
from eckart.hosts import EmbeddingHost, TiedHead, host
from eckart.maps import LowRank, stored
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import EMBEDDING, Known, Layer
from eckart.stats import CrossSum

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
    cross: CrossSum | None = None,
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
    metric = known.metric(layer, weight, cross if recipe.sequential else None)
    if metric is None:
        raise EckartError(f"the calibration texts never reach {layer.name}, so it cannot be fitted")
    family = recipe.family(option.structure)
    if family is not None:
        return _fit_family(weight, metric, family, option.rank, bias, dtype)
    regression = regress(weight, metric, rank=option.rank, accuracy=ACCURACY)
    if not recipe.update and layer.kind != EMBEDDING:
        return regression.fit(option.rank, recipe.storage, dtype, bias)
    fit = regression.fit(option.rank, "lowrank", torch.float64, bias)
    factors = cast(LowRank, fit.map)
    if recipe.update and cross is not None:
        factors = refit_up(weight, factors, cross.shifted.result(layer.name).second)
    built = stored(factors, recipe.storage, table=layer.kind == EMBEDDING)
    return dataclasses.replace(fit, map=built.to(dtype), bias=None if fit.bias is None else fit.bias.to(dtype))


def _fit_family(
    weight: Tensor, metric: Metric, family: Family, size: int, bias: Tensor | None, dtype: torch.dtype
) -> Fit:
    map_ = family.fit(weight, metric, size)
    error, zero = error_of(weight, map_.dense(), metric), error_of(weight, torch.zeros_like(weight), metric)
    rounded = map_.to(dtype)
    change = best_bias(weight, rounded, metric)
    offset = bias if change is None else change if bias is None else bias.double() + change
    return Fit(rounded, None if offset is None else offset.to(dtype), error, error / zero if zero > 0 else 0.0)


def loss_of(known: Known, fit: Fit) -> float:
    """Return a fit's predicted loss in the unit of its job's plan."""
    return fit.error * known.scale() if known.job.recipe.output_metric else fit.relative


def running(fit: Fit) -> nn.Module:
    """Return a fitted layer as a module that computes in float32 with its rounded numbers."""
    return host(fit.map.to(torch.float32), None if fit.bias is None else fit.bias.float())


def running_embedding(job: Job, fit: Fit) -> EmbeddingHost:
    """Return a fitted embedding as a module that computes in float32 with its rounded numbers."""
    name = job.parts.embedding or ""
    return EmbeddingHost(fit.map.to(torch.float32), cast("int | None", job.model.model.get_submodule(name).padding_idx))


def tied_head(job: Job, embedding: EmbeddingHost) -> dict[str, nn.Module]:
    """Return the head that goes with a compressed embedding, by name; empty if the head is not tied to it."""
    if not job.parts.tied or job.parts.head is None:
        return {}
    bias = f"{job.parts.head}.bias"
    held = job.model.read(bias).to(job.runner.device, torch.float32) if bias in job.model.names else None
    return {job.parts.head: TiedHead(embedding, held)}
