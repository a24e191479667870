"""Fewer channels per attention head: some channels of queries and keys are kept, values are projected.

    scores:  S the units u of largest  sum_(j shares g) |C_q^1/2 (:,u)| |C_k^1/2 (:,u)|,    C_q = E[q q^T] of head j
    values:  min of rank r over A B  of  sum_(j shares g) E | O_j v - A_j B v |^2,    v = V x + b of head g

A unit is a channel, or a pair of channels that positions rotate, whose norms no rotation changes. The second problem is
solved by the eigenvectors P of  R E[v v^T] R^T,  [O_j]_j = Q R:  A = Q P,  B = P^T R.  Heads of queries that share a
head g of keys and values are stacked, since they read the same values.

Source: Lin et al. 2024, "MoDeGPT", Algorithms 2 and 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg import top_eigen


@dataclass(frozen=True, slots=True)
class ValuesFit:
    """Values with fewer channels per head, and the layer that reads them.

    Attributes:
        weight: B V (keys * r, n) float64.
        bias: B b (keys * r,).
        out: A (d, queries * r).
        projectors: B (keys, r, size).
        error: the sum over heads of what is minimised.
        relative: the error over that of no values at all.
    """

    weight: Tensor
    bias: Tensor
    out: Tensor
    projectors: Tensor
    error: float
    relative: float


def output_moments(weight: Tensor, bias: Tensor, mean: Tensor, second: Tensor, heads: int) -> Tensor:
    """Return E[y y^T] of every head's part of y = W x + b, (heads, size, size) float64.

    Args:
        weight: W (heads * size, n).
        bias: b (heads * size,).
        mean: E[x], (n,).
        second: E[x x^T], (n, n).
        heads: how many equal parts y has.
    """
    w = weight.double().view(heads, -1, weight.shape[1])
    out = w @ second.double() @ w.mT
    b = bias.double().view(heads, -1)
    cross = (w @ mean.double())[:, :, None] * b[:, None, :]
    return out + cross + cross.mT + b[:, :, None] * b[:, None, :]


def choose_channels(query: Tensor, key: Tensor, units: Tensor, count: int) -> Tensor:
    """Return the channels of every key's head that its scores keep, ascending, (keys, count) int64.

    Args:
        query: E[q q^T] of every head of queries, (queries, size, size).
        key: E[k k^T] of every head of keys, (keys, size, size).
        units: the channels kept or dropped together, (units, 1) or (units, 2) int64.
        count: channels kept, a multiple of those in a unit.
    """
    units = units.to(query.device)
    power_q, power_k = (m.diagonal(dim1=1, dim2=2).clamp_min(0)[:, units].sum(2) for m in (query, key))
    shared = query.shape[0] // key.shape[0]
    scores = (power_q.view(key.shape[0], shared, -1) * power_k[:, None]).sqrt().sum(1)
    kept = scores.topk(count // units.shape[1], dim=1).indices
    return units[kept].flatten(1).sort(1).values


def fit_values(weight: Tensor, bias: Tensor, out: Tensor, moments: Tensor, count: int) -> ValuesFit:
    """Project the values of every head on fewer channels, so that what its outputs add to the residual stays close.

    Args:
        weight: V (keys * size, n).
        bias: b (keys * size,).
        out: O (d, queries * size) of the layer that reads the outputs of the heads.
        moments: E[v v^T] of every head, (keys, size, size).
        count: r, channels kept per head.
    """
    keys, size, _ = moments.shape
    d, v = out.shape[0], weight.double().view(keys, size, -1)
    # (d, keys, shared, size) -> (keys, shared * d, size)
    readers = out.double().view(d, keys, -1, size).permute(1, 2, 0, 3).reshape(keys, -1, size)
    projectors, narrow, error, total = [], [], 0.0, 0.0
    for reader, moment in zip(readers, moments, strict=True):
        q, r = torch.linalg.qr(reader)
        eigen = top_eigen(r @ moment @ r.mT, count)
        axes = eigen.vectors[:, :count]
        projectors.append(axes.mT @ r)
        narrow.append(q @ axes)
        error, total = error + float(eigen.tails()[count]), total + eigen.trace
    b = torch.stack(projectors)
    offset = (b @ bias.double().view(keys, size, 1)).flatten()
    a = torch.stack(narrow).view(keys, -1, d, count).permute(2, 0, 1, 3).reshape(d, -1)
    return ValuesFit((b @ v).flatten(0, 1), offset, a, b, error, error / total if total > 0 else 0.0)
