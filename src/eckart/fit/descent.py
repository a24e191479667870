"""Codes improved one column after the other, under the whole metric: what rounding with feedback cannot look back at.

    f(E) = tr(B E G E^T),   E = W' - W*,   P = B E G
    c_ij <- the code nearest to  w'_ij - P_ij / (B_ii G_jj)

Scales and zero points come first: with the codes held fixed, each row's have a closed form, and one step length for all
rows together keeps f falling although rows act on each other through B. So do codes: the rows of a column change in a
few groups, and a group stays as it is if f would rise.

Legend: W (m, n), W* the unconstrained optimum of the metric, G the moment of what the layer sees, B the output moment.
"""

import dataclasses

import torch
from torch import Tensor

from eckart.fit.metric import Metric, weighted, weighted_rows
from eckart.fit.quantize import BLOCK
from eckart.fit.regression import unconstrained
from eckart.maps import Interleaved, LinearMap, Quantized, pack, unpack

# Groups in which the rows of a column change where they act on each other; alone each would be best, and slowest.
GROUPS = 8
# Share of the mean in the normal equations of a row's scales: groups of zeros stay finite.
RIDGE = 1e-9


@dataclasses.dataclass(slots=True)
class _Rows:
    """A matrix of codes spelled out.

    Attributes:
        codes: (m, n) float64, 0 the middle code.
        half: (m, 1), half the number of codes of every row.
        scale: (m, groups).
        zero: (m, groups), or None.
        group_size: entries per scale.
    """

    codes: Tensor
    half: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int

    def spread(self, per_group: Tensor) -> Tensor:
        """Return a number per group as one per entry, (m, n)."""
        return per_group.repeat_interleave(self.group_size, dim=1)[:, : self.codes.shape[1]]

    def values(self) -> Tensor:
        """Return W' (m, n)."""
        out = self.codes * self.spread(self.scale)
        return out if self.zero is None else out + self.spread(self.zero)


def descend(weight: Tensor, metric: Metric, map_: LinearMap, *, sweeps: int = 3) -> LinearMap:
    """Return a matrix of codes with less error: better scales, then better codes.

    Args:
        weight: W (m, n).
        metric: what it was rounded under.
        map_: `Quantized` or `Interleaved` of such, groups along rows, uniform levels; anything else is returned as is.
        sweeps: rounds over all columns.

    Returns:
        A map of the same sizes and widths, float64; its scales are such as bfloat16 holds.
    """
    parts = map_.maps if isinstance(map_, Interleaved) else (map_,)
    second = metric.seen
    if second is None or second.ndim == 1 or not all(_is_plain(part) for part in parts):
        return map_
    which = map_.which.long() if isinstance(map_, Interleaved) else torch.zeros(map_.shape[0], dtype=torch.int64)
    rows = _spelled(parts, which)
    target, b = unconstrained(weight.double(), metric), metric.outputs
    _rescale(rows, target, second, b)
    slope = weighted(weighted_rows(rows.values() - target, second), b)
    for _ in range(sweeps):
        _sweep(rows, slope, second, b)
    new = tuple(_packed(part, rows, which == i) for i, part in enumerate(parts))  # type: ignore[arg-type]
    return Interleaved(new, map_.which) if isinstance(map_, Interleaved) else new[0]


def _sweep(rows: _Rows, slope: Tensor, second: Tensor, outputs: Tensor | None) -> None:
    """Improve the codes of every column in turn; rows and slope P are changed in place."""
    m, n = rows.codes.shape
    coupled = outputs is not None and outputs.ndim == 2
    b = torch.ones(m, dtype=slope.dtype, device=slope.device) if outputs is None else outputs
    curvature = b.diagonal() if coupled else b
    steps = rows.spread(rows.scale)
    every = torch.arange(m, device=slope.device)
    groups = [torch.arange(i, m, GROUPS, device=slope.device) for i in range(min(GROUPS, m))] if coupled else [every]
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        local, change = slope[:, start:end].clone(), torch.zeros_like(slope[:, start:end])
        for j in range(start, end):
            if not second[j, j] > 0:
                continue
            for group in groups:
                curved = curvature[group] * second[j, j]
                known = (curved > 0) & (steps[group, j] != 0)
                wanted = torch.where(known, -local[group, j - start] / curved / steps[group, j], 0.0)
                old, half = rows.codes[group, j], rows.half[group, 0]
                new = torch.minimum(torch.maximum((old + wanted).round(), -half), half - 1)
                delta = (new - old) * steps[group, j]
                moved = b[:, group] @ delta if coupled else b * delta
                rise = 2 * delta @ local[group, j - start] + second[j, j] * (delta @ moved[group])
                if rise >= 0:  # nothing changes, or rows of the group spoil each other's gain
                    continue
                rows.codes[group, j] = new
                change[group, j - start] += delta
                local += torch.outer(moved, second[j, start:end])
        slope += weighted(change, outputs) @ second[start:end]


def _rescale(rows: _Rows, target: Tensor, second: Tensor, outputs: Tensor | None) -> None:
    """Improve the scales and zero points of all rows with the codes held fixed; rows are changed in place."""
    m, n = rows.codes.shape
    count = rows.scale.shape[1]
    of = torch.arange(n, device=target.device) // rows.group_size
    inside = (of == torch.arange(count, device=target.device)[:, None]).to(target.dtype)  # (groups, n)
    design = rows.codes[:, None, :] * inside
    if rows.zero is not None:
        design = torch.cat((design, inside.expand(m, -1, -1)), 1)
    error = rows.values() - target
    seen = design @ second
    normal = seen @ design.mT
    size = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(target.dtype).tiny)
    normal.diagonal(dim1=1, dim2=2).add_(RIDGE * size[:, None])
    wanted = -torch.linalg.solve(normal, (seen @ error[:, :, None]))[:, :, 0]
    direction = (wanted[:, None, :] @ design)[:, 0]
    slope = weighted(weighted_rows(direction, second), outputs)
    fall, curvature = float((slope * error).sum()), float((slope * direction).sum())
    if not curvature > 0:
        return
    changed = wanted * (-fall / curvature)
    rows.scale = _rounded(rows.scale + changed[:, :count])
    if rows.zero is not None:
        rows.zero = _rounded(rows.zero + changed[:, count:])


def _rounded(numbers: Tensor) -> Tensor:
    """Return numbers as bfloat16, and with it every dtype of weights, holds them."""
    return numbers.to(torch.bfloat16).to(numbers.dtype)


def _is_plain(map_: LinearMap) -> bool:
    return isinstance(map_, Quantized) and map_.axis == "rows" and map_.levels is None


def _spelled(parts: tuple[LinearMap, ...], which: Tensor) -> _Rows:
    """Return the codes of interleaved matrices as one."""
    held = [part for part in parts if isinstance(part, Quantized)]
    m, n, first = which.shape[0], held[0].width, held[0]
    codes, half = first.scale.new_zeros(m, n, dtype=torch.float64), first.scale.new_zeros(m, 1, dtype=torch.float64)
    scale = codes.new_zeros(m, first.scale.shape[1])
    zero = None if first.zero is None else torch.zeros_like(scale)
    for i, part in enumerate(held):
        middle = 2 ** (part.bits - 1)
        rows = which == i
        codes[rows], half[rows] = unpack(part.codes, n, part.bits).double() - middle, float(middle)
        scale[rows] = part.scale.double()
        if zero is not None and part.zero is not None:
            zero[rows] = part.zero.double()
    return _Rows(codes, half, scale, zero, first.group_size)


def _packed(map_: Quantized, rows: _Rows, chosen: Tensor) -> Quantized:
    """Return some rows as a matrix of codes like one given."""
    codes = pack((rows.codes[chosen] + rows.half[chosen]).long(), map_.bits)
    zero = None if rows.zero is None else rows.zero[chosen]
    return dataclasses.replace(map_, codes=codes, scale=rows.scale[chosen], zero=zero)
