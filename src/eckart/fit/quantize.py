"""Rounding a matrix to codes of a few bits: which values the codes stand for, and which code every entry takes.

    W'_ij = scale_ig l_i(c_ij) + zero_ig,    min over the codes c of  E | T (W x - W' x) |^2

A grid (scales, zero points, levels) is chosen first: from the extremes of each group, or from the share of them with
the least error under the metric's diagonals; levels are whole numbers, or come from weighted k-means. Then the codes:
nearest, or one column after the other, each column's error fed back into those not rounded yet (GPTQ).

Legend: W (m, n), G = E[x x^T] (n, n), B the output moment, g the group of column j, l_i the levels of row i.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.linalg import shrink
from eckart.maps import BITS, Quantized, pack

Rounding = Literal["nearest", "feedback"]
Levels = Literal["uniform", "learned"]

# Shares of a group's extremes that the search over scales tries.
SHARES = tuple(1 - i / 40 for i in range(25))
# Rounds of k-means; the error falls with each, and hardly after these.
ROUNDS = 30
# Share of the isotropic moment in G before it is inverted, as in the authors' code of GPTQ.
DAMPING = 0.01
# Columns whose errors are fed to the others in one product.
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Coding:
    """How numbers are stored as codes.

    Attributes:
        bits: per code: 2, 3, 4, 5, 6 or 8.
        group_size: entries that share a scale.
        rounding: "nearest", or "feedback" of every column's error into the later ones (GPTQ).
        levels: "uniform", or "learned" per row by k-means (any4).
        symmetric: whether there are no zero points.
        clip: whether scales come from a search instead of from the extremes.
    """

    bits: int
    group_size: int = 128
    rounding: Rounding = "feedback"
    levels: Levels = "uniform"
    symmetric: bool = False
    clip: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise EckartError(f"bits must be one of {', '.join(map(str, BITS))}, or 0 for no codes, got {self.bits}")
        if self.group_size < 1:
            raise EckartError(
                f"group_size is the number of entries that share a scale, at least 1, got {self.group_size}"
            )

    def axis(self, shape: tuple[int, int]) -> str:
        """Return along which axis groups run in a matrix (m, n): the one that needs fewer scales."""
        m, n = shape
        return "rows" if m * -(-n // self.group_size) <= n * -(-m // self.group_size) else "columns"


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that the entries of a matrix may take, spelled out per entry; groups along either axis.

    Attributes:
        scale: (m, n), zero where a group has no extent.
        zero: (m, n).
        levels: ascending, (m, 2^b) per row or (n, 2^b) per column, or None for c - 2^(b - 1).
        bits: b.
        by_column: whether levels belong to columns.
    """

    scale: Tensor
    zero: Tensor
    levels: Tensor | None
    bits: int
    by_column: bool = False

    def codes(self, values: Tensor) -> Tensor:
        """Return the nearest codes of a whole matrix, (m, n) int64."""
        return self._nearest(values, self.scale, self.zero, self.levels, self.by_column)

    def column(self, j: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest codes of a column (m,), and what they stand for."""
        scale, zero, levels = self.scale[:, j, None], self.zero[:, j, None], self.levels
        if levels is not None and self.by_column:
            levels = levels[j].expand(values.shape[0], -1)
        codes = self._nearest(values[:, None], scale, zero, levels, False)
        return codes[:, 0], self._values(codes, scale, zero, levels, False)[:, 0]

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes stand for, (m, n)."""
        return self._values(codes, self.scale, self.zero, self.levels, self.by_column)

    def _nearest(self, values: Tensor, scale: Tensor, zero: Tensor, levels: Tensor | None, turned: bool) -> Tensor:
        unit: Tensor = torch.where(scale == 0, 0.0, (values - zero) / scale)
        if levels is None:
            half = 2 ** (self.bits - 1)
            whole: Tensor = unit.round().clamp(-half, half - 1) + half
            return whole.long()
        codes: Tensor = nearest_level(unit.mT, levels).mT if turned else nearest_level(unit, levels)
        return codes

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor, levels: Tensor | None, turned: bool) -> Tensor:
        if levels is None:
            unit = (codes - 2 ** (self.bits - 1)).to(scale.dtype)
        else:
            unit = levels.gather(1, codes.mT).mT if turned else levels.gather(1, codes)
        out: Tensor = unit * scale + zero
        return out


def quantize(
    weight: Tensor,
    coding: Coding,
    second: Tensor | None = None,
    *,
    outputs: Tensor | None = None,
    axis: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Return the nearest matrix of codes that a coding finds.

    Args:
        weight: W (m, n).
        coding: how.
        second: G = E[x x^T] (n, n), (n,) if diagonal, or None for the identity.
        outputs: B (m, m) or (m,); only its diagonal matters, where a group spans several rows.
        axis: along which groups run, "rows" or "columns"; None for the one that needs fewer scales.
        dtype: of scales, zero points and levels; codes are chosen for them as rounded to it.

    Returns:
        The map, in that dtype.
    """
    w, axis = weight.double(), axis or coding.axis((weight.shape[0], weight.shape[1]))
    importance = _importance(w, second, outputs)
    turned, weights = (w, importance) if axis == "rows" else (w.mT, importance.mT)
    scale, zero = _scales(turned, coding, weights, dtype)
    wide = [_spread(t, coding.group_size, turned.shape[1]) for t in (scale, zero)]
    levels = None
    if coding.levels == "learned":
        plain = Grid(wide[0], wide[1], None, coding.bits)
        levels = _learned_levels(turned, plain, weights).to(dtype).double()
    spelled = wide if axis == "rows" else [t.mT for t in wide]
    grid = Grid(spelled[0], spelled[1], levels, coding.bits, axis == "columns")
    if coding.rounding == "feedback" and second is not None and second.ndim == 2:
        codes = feedback(w, grid, second)
    else:
        codes = grid.codes(w)
    data = pack(codes if axis == "rows" else codes.mT, coding.bits)
    kept = None if coding.symmetric else zero.to(dtype)
    table = None if levels is None else levels.to(dtype)
    return Quantized(data, scale.to(dtype), kept, table, turned.shape[1], coding.bits, coding.group_size, axis)


def blank_quantized(
    shape: tuple[int, int], coding: Coding, dtype: torch.dtype, *, axis: str | None = None
) -> Quantized:
    """Return what `quantize` makes of a matrix of a shape, on the meta device: its sizes without its numbers."""
    axis = axis or coding.axis(shape)
    m, n = shape if axis == "rows" else shape[::-1]
    per_group = (m, -(-n // coding.group_size))

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    zero = None if coding.symmetric else empty(*per_group)
    levels = empty(m, 2**coding.bits) if coding.levels == "learned" else None
    data = torch.empty((m, -(-n * coding.bits // 8)), dtype=torch.uint8, device="meta")
    return Quantized(data, empty(*per_group), zero, levels, n, coding.bits, coding.group_size, axis)


def feedback(weight: Tensor, grid: Grid, second: Tensor, damping: float = DAMPING) -> Tensor:
    """Return codes (m, n) by rounding column after column, each error fed back into the columns not rounded yet.

        e = (w_j - q_j) / U_jj,    w_l <- w_l - e U_jl  for l > j,    U upper Cholesky factor of G^-1

    which is, for every j, the least-squares change of the later columns given the error of column j. Columns of
    large inputs come first, as long as many others can still make up for their errors.

    Args:
        weight: W (m, n) float64.
        grid: the values entries may take.
        second: G (n, n).
        damping: share of the isotropic moment in G.

    Source: Frantar et al. 2022, "GPTQ", Algorithm 1, with the order of columns of the authors' code (act-order).
    """
    order = second.diagonal().argsort(descending=True, stable=True)
    moment = shrink(second.double(), damping)[order][:, order]
    if not bool((moment.diagonal() > 0).all()):  # no inputs at all: nothing to make up for
        return grid.codes(weight)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.int64, device=weight.device)
    columns = order.tolist()
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        errors = torch.empty_like(left[:, start:end])
        for j in range(start, end):
            codes[:, columns[j]], rounded = grid.column(columns[j], left[:, j])
            error = (left[:, j] - rounded) / factor[j, j]
            left[:, j + 1 : end] -= torch.outer(error, factor[j, j + 1 : end])
            errors[:, j - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest of a row's ascending levels: (m, n) and (m, k) -> (m, n) int64."""
    return torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), values.contiguous())


def kmeans_rows(values: Tensor, weights: Tensor, levels: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Improve the levels of every row by weighted k-means in one dimension (Lloyd); no round raises a row's error.

        min over l_1 <= ... <= l_k of  sum_j weights_j min_c (values_j - l_c)^2

    Args:
        values: (m, n).
        weights: (m, n), not negative.
        levels: (m, k) ascending, to start from; one that no value is nearest to stays.
        rounds: how many.

    Returns:
        (m, k), ascending.
    """
    for _ in range(rounds):
        codes, sums = nearest_level(values, levels), torch.zeros_like(levels)
        total = torch.zeros_like(levels).scatter_add(1, codes, weights)
        sums = sums.scatter_add(1, codes, weights * values)
        means = torch.where(total > 0, sums / total, levels)
        if torch.equal(means, levels):
            break
        levels = means
    return levels


def level_error(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Return the weighted squared error of every row at its nearest levels, (m,)."""
    return (weights * (values - levels.gather(1, nearest_level(values, levels))).square()).sum(1)


def _learned_levels(weight: Tensor, plain: Grid, importance: Tensor) -> Tensor:
    """Return levels (m, 2^b) by k-means on scaled entries, from the uniform levels and from quantiles; the better."""
    count = 2**plain.bits
    unit = torch.where(plain.scale == 0, 0.0, (weight - plain.zero) / plain.scale)
    weights = importance * plain.scale.square()
    uniform: Tensor = torch.arange(count, dtype=unit.dtype, device=unit.device) - count // 2
    uniform = uniform.expand(unit.shape[0], -1)
    if not unit.shape[1]:
        return uniform
    places = ((torch.arange(count, device=unit.device) + 0.5) / count * unit.shape[1]).long()
    starts = uniform, unit.sort(dim=1).values[:, places]
    found = [kmeans_rows(unit, weights, start.contiguous()) for start in starts]
    errors = [level_error(unit, weights, levels) for levels in found]
    better: Tensor = torch.where((errors[0] <= errors[1])[:, None], found[0], found[1])
    return better


def _scales(weight: Tensor, coding: Coding, importance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and zero (m, groups) float64, rounded to the dtype, of least error among those tried."""
    m, n = weight.shape
    pad = (0, -n % coding.group_size)
    groups = F.pad(weight, pad).view(m, -(-n // coding.group_size), coding.group_size)
    counts = F.pad(importance, pad).view_as(groups)  # what is padded counts nothing
    inside = F.pad(torch.ones_like(weight, dtype=torch.bool), pad).view_as(groups)
    low = torch.where(inside, groups, torch.inf).amin(2)
    high = torch.where(inside, groups, -torch.inf).amax(2)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.zeros_like(low)
    for scale, zero in _candidates(low, high, coding, dtype):
        if best is None and not coding.clip:
            return scale, zero
        grid = Grid(scale[:, :, None], zero[:, :, None], None, coding.bits)
        error = (counts * (groups - grid.values(grid.codes(groups))).square()).sum(2)
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.minimum(error, least)
    return best if best is not None else (low, high)  # no groups at all


def _candidates(low: Tensor, high: Tensor, coding: Coding, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return pairs (scale, zero) to try, the one that covers the extremes first."""
    half = 2 ** (coding.bits - 1)
    out = []
    for share in SHARES if coding.clip else (1.0,):
        if coding.symmetric:
            # The codes reach one further down than up: either all of the group fits, or its extreme is the lowest code,
            # with a negative scale if it is positive.
            widest = torch.where(high > -low, high, low)
            options = [torch.maximum(high / (half - 1), -low / half), -widest / half]
            out += [(share * scale, torch.zeros_like(scale)) for scale in options]
        else:
            scale = share * (high - low) / (2 * half - 1)
            out.append((scale, share * low + scale * half))
    return [(scale.to(dtype).double(), zero.to(dtype).double()) for scale, zero in out]


def _importance(weight: Tensor, second: Tensor | None, outputs: Tensor | None) -> Tensor:
    """Return how much the square of each entry's error counts, (m, n): the product of the metric's diagonals."""
    out = torch.ones_like(weight)
    for moment, shape in ((second, (1, -1)), (outputs, (-1, 1))):
        if moment is not None:
            diagonal = moment.diagonal() if moment.ndim == 2 else moment
            out = out * diagonal.to(out).clamp_min(0).view(shape)
    return out


def _spread(per_group: Tensor, group_size: int, width: int) -> Tensor:
    """Return a number per group (m, groups) as one per entry (m, n)."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :width]
