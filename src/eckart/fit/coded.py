"""Any fitted map with its numbers stored as codes: the factor applied first is rounded under the inputs' moment, then
the other is refitted to what the rounded one gives, and rounded under the moment of that.

    V' = codes of D^-1 V under G,    U* = W* G V'^T (V' G V'^T)^-1,    U' = codes of U* under V' G V'^T
    D_jj = (std (V x)_j / rms U_j)^(1/2)

A product does not change if a number moves between its factors; D is where the noise of rounding U is least for equal
steps in all of its columns: sum_j var_j / d_j^2 times mean_j d_j^2 u_j^2 is least where d_j^2 = std_j / u_j.

Legend: W* (m, n) the unconstrained optimum of the metric, G the moment of what the layer sees, U (m, k), V (k, n).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit.dictionary import best_atoms
from eckart.fit.metric import Metric
from eckart.fit.quantize import Coding, blank_quantized, quantize
from eckart.fit.refit import refit_up
from eckart.fit.regression import unconstrained
from eckart.maps import (
    Bitmap,
    Blocks,
    Dense,
    LinearMap,
    LowRank,
    Permutation,
    Pivoted,
    Product,
    Quantized,
    Scattered,
    Sum,
    inverse_order,
)


def coded(
    map_: LinearMap, weight: Tensor, metric: Metric, coding: Coding, dtype: torch.dtype, *, table: bool = False
) -> LinearMap:
    """Return a fitted map with its numbers as codes.

    Args:
        map_: what W was fitted to: `Dense`, `LowRank`, `Pivoted`, a dictionary, or low rank plus sparse.
        weight: W (m, n).
        metric: what it was fitted under.
        coding: how numbers are stored.
        dtype: of scales, zero points and levels.
        table: whether rows will be looked up, so that groups must run along those of the first factor.

    Returns:
        `Quantized` for `Dense`; `Product(Quantized, Quantized)` for `LowRank`; a product of codes, `Permutation`s and
        `Blocks` for `Pivoted`; `Scattered` codes for sparse maps. All in as many numbers.
    """
    w = weight.double()
    target, axis = unconstrained(w, metric), "rows" if table else None
    match map_:
        case Dense():
            return quantize(target, coding, metric.seen, outputs=metric.outputs, axis=axis, dtype=dtype)
        case LowRank(up, down) if map_.rank:
            return Product(_factors(target, LowRank(up.double(), down.double()), metric, coding, dtype, axis))
        case Pivoted() if map_.rank:
            return _pivoted(target, map_, metric, coding, dtype, axis)
        case Sum((LowRank() as low, Bitmap() as sparse)):
            entries = _entries(sparse, coding, dtype)
            rest = Metric(inputs=metric.seen, outputs=metric.outputs)
            return Sum((coded(low, target - entries.to(torch.float64).dense(), rest, coding, dtype), entries))
        case Product((Bitmap() as sparse, Dense())):
            entries = _entries(sparse, coding, dtype)
            atoms = best_atoms(entries.to(torch.float64).dense(), target, metric.outputs)
            return Product((entries, quantize(atoms, coding, metric.seen, dtype=dtype)))
    return map_.to(dtype)


def coded_shared(
    maps: Sequence[LinearMap], weights: Sequence[Tensor], metrics: Sequence[Metric], coding: Coding, dtype: torch.dtype
) -> tuple[LinearMap, ...]:
    """Return maps that share their right factor with their numbers as codes: that factor once, every other on its own.

    The shared factor is rounded under the sum of the moments; a basis before the left factors are refitted to it, each
    under its own moment, a dictionary after it is refitted to the rounded entries of all.

    Args:
        maps: what the layers were fitted to: `LowRank`, or a dictionary; the right factor is the same for all.
        weights: W_i (m_i, n).
        metrics: what they were fitted under, on original inputs.
        coding: how numbers are stored.
        dtype: of scales, zero points and levels.
    """
    targets = [weight.double() for weight in weights]
    moments = [moment_matrix(metric.seen, target) for metric, target in zip(metrics, targets, strict=True)]
    common = sum(moments[1:], moments[0])
    if all(isinstance(map_, LowRank) for map_ in maps):
        factors = [LowRank(map_.up.double(), map_.down.double()) for map_ in maps if isinstance(map_, LowRank)]
        scales = balance(LowRank(torch.cat([one.up for one in factors]), factors[0].down), common)
        down = quantize(factors[0].down / scales[:, None], coding, common, dtype=dtype)
        shown = down.to(torch.float64).dense()
        parts = zip(targets, factors, moments, metrics, strict=True)
        ups = [
            _up(w, LowRank(f.up * scales, shown), g, metric.outputs, coding, dtype, None) for w, f, g, metric in parts
        ]
        return tuple(Product((up, down)) for up in ups)
    entries = []
    for map_ in maps:
        match map_:
            case Product((Bitmap() as sparse, Dense())):
                entries.append(_entries(sparse, coding, dtype))
            case _:
                raise EckartError(
                    f"layers can share the right factor of low-rank maps and of dictionaries, not {map_!r}"
                )
    atoms = best_atoms(torch.cat([one.to(torch.float64).dense() for one in entries]), torch.cat(targets))
    shared = quantize(atoms, coding, common, dtype=dtype)
    return tuple(Product((one, shared)) for one in entries)


def coded_blank(map_: LinearMap, coding: Coding, dtype: torch.dtype, *, table: bool = False) -> LinearMap:
    """Return what `coded` makes of a map on the meta device: its sizes without its numbers."""
    first = "rows" if table else None

    def blank(part: Tensor, axis: str | None = None) -> Quantized:
        return blank_quantized((part.shape[0], part.shape[1]), coding, dtype, axis=axis)

    match map_:
        case Dense(weight):
            return blank(weight, first)
        case LowRank(up, down) if map_.rank:
            return Product((blank(up, first), blank(down)))
        case Pivoted(basis, coefficients, order, axis) if map_.rank:
            return _joined(blank(basis, first if axis == "columns" else None), blank(coefficients), order, axis)
        case Sum((LowRank() as low, Bitmap() as sparse)):
            return Sum((coded_blank(low, coding, dtype), Scattered(blank(sparse.values), sparse.bits, sparse.width)))
        case Product((Bitmap() as sparse, Dense(atoms))):
            return Product((Scattered(blank(sparse.values), sparse.bits, sparse.width), blank(atoms)))
    return map_.to(dtype)


def _factors(
    target: Tensor, factors: LowRank, metric: Metric, coding: Coding, dtype: torch.dtype, axis: str | None
) -> tuple[Quantized, Quantized]:
    """Return the codes of two factors, balanced."""
    second = moment_matrix(metric.seen, target)
    scales = balance(factors, second)
    down = quantize(factors.down / scales[:, None], coding, metric.seen, dtype=dtype)
    shown, outputs = down.to(torch.float64).dense(), metric.outputs
    return _up(target, LowRank(factors.up * scales, shown), second, outputs, coding, dtype, axis), down


def _pivoted(
    target: Tensor, map_: Pivoted, metric: Metric, coding: Coding, dtype: torch.dtype, axis: str | None
) -> LinearMap:
    """Return a pivoted map of codes; the part applied last is refitted to the other's rounding."""
    basis, coefficients, k = map_.basis.double(), map_.coefficients.double(), map_.rank
    second, order = moment_matrix(metric.seen, target), map_.order.long()
    if map_.axis == "rows":
        pivots = quantize(basis, coding, metric.seen, dtype=dtype)
        rest, shown = target[inverse_order(order)][k:], pivots.to(torch.float64).dense()
        others = _up(rest, LowRank(coefficients, shown), second, None, coding, dtype, None)
        return _joined(pivots, others, map_.order, map_.axis)
    others = quantize(coefficients, coding, second[order][:, order][k:, k:], dtype=dtype)
    unit = torch.eye(k, dtype=target.dtype, device=target.device)
    shown = torch.cat((unit, others.to(torch.float64).dense()), 1)[:, inverse_order(order)]
    pivots = _up(target, LowRank(basis, shown), second, metric.outputs, coding, dtype, axis)
    return _joined(pivots, others, map_.order, map_.axis)


def _up(
    target: Tensor,
    factors: LowRank,
    second: Tensor,
    outputs: Tensor | None,
    coding: Coding,
    dtype: torch.dtype,
    axis: str | None,
) -> Quantized:
    """Return the codes of a left factor, refitted to the target with the right one as rounded."""
    refitted, down = refit_up(target, factors, second).up, factors.down
    return quantize(refitted, coding, down @ second @ down.mT, outputs=outputs, axis=axis, dtype=dtype)


def _joined(basis: Quantized, coefficients: Quantized, order: Tensor, axis: str) -> LinearMap:
    """Return the product that a `Pivoted` of such parts is."""
    k = basis.shape[0 if axis == "rows" else 1]
    identity = Permutation(torch.arange(k, dtype=torch.int32, device=order.device))
    if axis == "rows":
        return Product((Permutation(order), Blocks(((identity,), (coefficients,))), basis))
    return Product((basis, Blocks(((identity, coefficients),)), Permutation(order)))


def _entries(sparse: Bitmap, coding: Coding, dtype: torch.dtype) -> Scattered:
    """Return a sparse matrix with its entries as codes; neighbours in a row have no common inputs to make up for."""
    return Scattered(quantize(sparse.values, coding, dtype=dtype), sparse.bits, sparse.width)


def balance(factors: LowRank, second: Tensor) -> Tensor:
    """Return D (k,): by what the columns of U are multiplied and the rows of V divided."""
    std = torch.einsum("ki,ij,kj->k", factors.down, second, factors.down).clamp_min(0).sqrt()
    rms = factors.up.square().mean(0).sqrt()
    known = (std > 0) & (rms > 0)
    return torch.where(known, std / torch.where(known, rms, 1.0), 1.0).sqrt()


def moment_matrix(moment: Tensor | None, like: Tensor) -> Tensor:
    """Return a moment as a matrix (n, n) for a weight (m, n)."""
    if moment is None:
        return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return moment if moment.ndim == 2 else torch.diag(moment)
