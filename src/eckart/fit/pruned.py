"""Sparse matrices under a metric: which entries stay is found by ADMM, what they become is least squares.

    min over S of a pattern of  | (W* - S) G^(1/2) |^2:    with columns scaled so that diag G = 1, in turn
        V = (W* G + Z - U) (G + I)^-1,    Z = the pattern's nearest matrix to V + U,    U <- U + V - Z

and, for the places of Z, conjugate gradients on all entries together under the whole metric, in which rows act on each
other. The latter improves the entries of any map that has some: beside a low-rank map, or as codes of a dictionary.

    min over the entries of S of  tr(B E G E^T),    E = S D - W*,    D the dictionary or the identity

Legend: W (m, n), W* the unconstrained optimum of the metric, G the moment of what the layer sees, B the output moment.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from eckart.fit.dictionary import best_atoms
from eckart.fit.metric import Metric, weighted, weighted_rows
from eckart.fit.regression import regress, unconstrained
from eckart.maps import NM, Bitmap, Dense, LinearMap, LowRank, Product, Sum

# Rounds of ADMM, and of conjugate gradients; the error hardly falls after these.
ROUNDS = 20
STEPS = 15
TINY = torch.finfo(torch.float64).tiny


def pruner(weight: Tensor, metric: Metric, rounds: int = ROUNDS) -> Callable[[Callable[[Tensor], Tensor]], Tensor]:
    """Return what prunes a weight to any pattern, under the moment of the inputs.

    Args:
        weight: W (m, n).
        metric: what close means.
        rounds: of ADMM.

    Returns:
        (projection of a matrix to the nearest of a pattern) -> such a matrix (m, n), float64, near W.

    Source: Boza 2024, "Fast and effective weight update for pruned large language models", Algorithm 1, whose gradual
    schedule is left out: the patterns found without are as good on all layers tried.
    """
    target, second = unconstrained(weight.double(), metric), metric.seen
    if second is None or second.ndim == 1:  # columns do not make up for each other
        scale = torch.ones_like(target[0]) if second is None else _root(second)
        return lambda project: project(target * scale) / scale
    scale = _root(second.diagonal())
    scaled, moment = target * scale, second / scale / scale[:, None]
    identity = torch.eye(scale.shape[0], dtype=moment.dtype, device=moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + identity))
    pulled = scaled @ moment

    def prune(project: Callable[[Tensor], Tensor]) -> Tensor:
        kept, dual = project(scaled), torch.zeros_like(scaled)
        for _ in range(rounds):
            free = (pulled + kept - dual) @ inverse
            kept = project(free + dual)
            dual += free - kept
        return kept / scale

    return prune


def improve_entries(weight: Tensor, metric: Metric, map_: LinearMap) -> LinearMap:
    """Return a map whose sparse entries, and what stands beside them, are nearer to the weight; the places stay.

    Args:
        weight: W (m, n).
        metric: what close means.
        map_: `Bitmap`, `NM`, a sum of `LowRank` and one of these, or a dictionary; anything else is returned as it is.
    """
    target = unconstrained(weight.double(), metric)
    match map_:
        case Bitmap() | NM():
            return _refitted(map_, target, metric)
        case Sum((LowRank() as low, (Bitmap() | NM()) as entries)):
            kept = _refitted(entries, target - low.dense(), metric)
            if low.rank:
                low = regress(target - kept.dense(), metric.on_seen(), rank=low.rank).factors(low.rank)
            return Sum((low, _refitted(kept, target - low.dense(), metric)))
        case Product((Bitmap() as codes, Dense(atoms))):
            refitted = _refitted(codes, target, metric, atoms)
            return Product((refitted, Dense(best_atoms(refitted.dense(), target, metric.outputs))))
    return map_


def _refitted(entries: Bitmap | NM, target: Tensor, metric: Metric, atoms: Tensor | None = None) -> Bitmap | NM:
    """Return the same places with values of less error."""
    columns = _columns(entries)
    mask = torch.zeros(entries.shape, dtype=target.dtype, device=target.device).scatter(1, columns, 1.0)
    values = improve_values(entries.dense(), mask, target, metric, atoms)
    return dataclasses.replace(entries, values=values.gather(1, columns).view_as(entries.values))


def improve_values(
    values: Tensor, mask: Tensor, target: Tensor, metric: Metric, atoms: Tensor | None = None, steps: int = STEPS
) -> Tensor:
    """Return values of less error under the whole metric, by preconditioned conjugate gradients.

    Args:
        values: S (m, n) to start from, zero where the mask is.
        mask: (m, n), 1 where values may be, 0 elsewhere.
        target: W* (m, n), or (m, n') with atoms.
        metric: what close means.
        atoms: D (n, n'), or None for the identity.
        steps: of conjugate gradients; no step makes the error larger.
    """
    outputs, seen = metric.outputs, metric.seen
    error = (values if atoms is None else values @ atoms) - target
    if atoms is None:
        pulled, second = weighted_rows(error, seen), seen
    else:
        pulled = weighted_rows(error, seen) @ atoms.mT
        second = weighted_rows(atoms, seen) @ atoms.mT
    residual = -mask * weighted(pulled, outputs)
    curvature = mask * _diagonal(outputs, mask.shape[0], mask)[:, None] * _diagonal(second, mask.shape[1], mask)
    inverse = torch.where(curvature > 0, 1 / curvature.clamp_min(TINY), 0.0)
    step = inverse * residual
    size = float((residual * step).sum())
    for _ in range(steps):
        if not size > 0:
            break
        bent = mask * weighted(weighted_rows(step, second), outputs)
        length = size / max(float((step * bent).sum()), TINY)
        values, residual = values + length * step, residual - length * bent
        preconditioned = inverse * residual
        before, size = size, float((residual * preconditioned).sum())
        step = preconditioned + size / before * step
    return values


def _columns(entries: Bitmap | NM) -> Tensor:
    """Return the column of every entry, row by row, (m, s) int64."""
    if isinstance(entries, NM):
        return entries.columns()
    ones = dataclasses.replace(entries, values=torch.ones_like(entries.values))
    return ones.dense().nonzero()[:, 1].view(entries.values.shape)


def _diagonal(moment: Tensor | None, size: int, like: Tensor) -> Tensor:
    if moment is None:
        return like.new_ones(size)
    return moment.diagonal() if moment.ndim == 2 else moment


def _root(squares: Tensor) -> Tensor:
    """Return root mean squares, at least 1e-6 of the largest, 1 where all are zero."""
    largest = squares.max()
    return squares.clamp_min(1e-12 * float(largest)).sqrt() if largest > 0 else torch.ones_like(squares)
