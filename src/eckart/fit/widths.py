"""Codes of several widths in one matrix: every row gets as many bits as rounding it less is worth.

    min over b_1, ..., b_m of  sum_i B_ii e_i(b_i),  sum_i b_i <= m b,  e_i(b) = | row i less its codes of b bits |^2_G

Rows are rounded apart from each other, so that the matrix rounded once at every width gives all e_i(b), and maps of any
mean width b from them. Rows of a token table differ most: what is rare may be coarse.

Legend: W (m, n), G the moment of what the layer sees, B the output moment.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit.descent import descend
from eckart.fit.families import Family
from eckart.fit.metric import Metric, weighted_rows
from eckart.fit.quantize import Coding, blank_quantized, quantize
from eckart.fit.regression import unconstrained
from eckart.maps import Interleaved, LinearMap, Quantized

# Sizes count hundredths of a bit per number; the mean widths offered are this many of them apart.
HUNDREDTHS, STEP = 100, 25
# Halvings in the search for the price of a bit.
HALVINGS = 60

Shape = tuple[int, int]


def widths_family(codings: Sequence[Coding], name: str = "codes") -> Family:
    """Return the family of codes whose width differs from row to row: at size s, s / 100 bits per number on average.

    Args:
        codings: what a row may become, by ascending bits, otherwise alike and with uniform levels; groups along rows.
        name: as plans show it.

    Raises:
        EckartError: for tables of levels, whose size does not follow from the mean width.
    """
    first, least, most = codings[0], codings[0].bits, codings[-1].bits
    if first.levels != "uniform":
        raise EckartError(f"codes of several widths have uniform levels, got levels={first.levels}")

    def code_bytes(shape: Shape, size: int, itemsize: int) -> int:
        m, n = shape
        codes = -(-_total(shape, size) * n // 8) + (m if n % 8 else 0)  # every row starts a byte
        return codes + m + m * -(-n // first.group_size) * itemsize * (1 if first.symmetric else 2)

    def fitter(weight: Tensor, metric: Metric) -> Callable[[int], LinearMap]:
        return partial(at_size, *coded_rows(weight, metric, codings))

    def example(shape: Shape, size: int, device: torch.device) -> LinearMap:
        return blank_quantized(shape, codings[-1], torch.float32, axis="rows")

    return Family(
        name,
        lambda shape, size: shape[0] * shape[1],
        lambda shape, size: shape[0],
        lambda shape: HUNDREDTHS * most,
        fitter,
        example,
        finish=descend if first.rounding == "feedback" else None,
        code_bytes=code_bytes,
        offered=tuple(range(HUNDREDTHS * least, HUNDREDTHS * most + 1, STEP)),
    )


def coded_rows(weight: Tensor, metric: Metric, codings: Sequence[Coding]) -> tuple[list[Quantized], Tensor]:
    """Return a matrix rounded at every width, and the error of every row at each, (m, widths) float64."""
    target, maps, errors = unconstrained(weight.double(), metric), [], []
    outputs = metric.outputs
    diagonal = outputs.diagonal() if outputs is not None and outputs.ndim == 2 else outputs
    for coding in codings:
        # What bfloat16 holds, every dtype of weights holds as it is.
        map_ = quantize(target, coding, metric.seen, outputs=outputs, axis="rows", dtype=torch.bfloat16)
        change = target - map_.to(torch.float64).dense()
        error = (weighted_rows(change, metric.seen) * change).sum(1)
        maps.append(map_)
        errors.append(error if diagonal is None else error * diagonal)
    return maps, torch.stack(errors, 1)


def at_size(maps: Sequence[Quantized], errors: Tensor, size: int) -> LinearMap:
    """Return the rows of some roundings of a matrix that have least error together at a mean width, float64.

    Args:
        maps: the matrix (m, n) at ascending widths, groups along rows.
        errors: of every row at each, (m, widths).
        size: the mean width in hundredths of a bit, at least the least width.
    """
    bits = torch.tensor([map_.bits for map_ in maps], dtype=torch.float64, device=errors.device)
    which = row_widths(errors, bits, _total(maps[0].shape, size))
    used = [i for i in range(len(maps)) if bool((which == i).any())]
    parts = tuple(_rows(maps[i], which == i) for i in used)
    if len(parts) == 1:
        return parts[0]
    places = torch.zeros(len(maps), dtype=torch.uint8, device=errors.device)
    places[used] = torch.arange(len(used), dtype=torch.uint8, device=errors.device)
    return Interleaved(parts, places[which])


def row_widths(errors: Tensor, bits: Tensor, total: float) -> Tensor:
    """Return which width every row gets, (m,) int64: least error together, bits that sum to at most a total.

    At any price of a bit, every row takes the width that costs it least; the price is searched for. Rows that would be
    the next to take more take it while that fits, those that save most error per bit first.

    Args:
        errors: (m, widths).
        bits: (widths,) ascending.
        total: at least m times the least width.
    """

    def at(price: float) -> Tensor:
        return (errors + price * bits).argmin(1)

    low, high = 0.0, float(errors.max()) + 1.0  # at the high price every row takes the least width
    for _ in range(HALVINGS if float(bits[at(low)].sum()) > total else 0):
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-6
        low, high = (low, middle) if float(bits[at(middle)].sum()) <= total else (middle, high)
        if low == 0 and high < torch.finfo(torch.float64).tiny:
            break
    if float(bits[at(low)].sum()) <= total:
        return at(low)
    chosen, more = at(high), at(low)
    step = bits[more] - bits[chosen]
    saved = (errors.gather(1, chosen[:, None]) - errors.gather(1, more[:, None]))[:, 0]
    order = (saved / step.clamp_min(1)).argsort(descending=True, stable=True)
    order = order[step[order] > 0]
    fits = step[order].cumsum(0) <= total - float(bits[chosen].sum())
    chosen[order[fits]] = more[order[fits]]
    return chosen


def _total(shape: Shape, size: int) -> int:
    """Return the bits that a column of codes may take at a size."""
    return shape[0] * size // HUNDREDTHS


def _rows(map_: Quantized, rows: Tensor) -> Quantized:
    """Return some rows of a matrix of codes, with float64 scales."""
    zero = None if map_.zero is None else map_.zero[rows].double()
    return Quantized(map_.codes[rows], map_.scale[rows].double(), zero, None, map_.width, map_.bits, map_.group_size)
