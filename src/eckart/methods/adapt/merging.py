"""Merging an adapter into its layer without breaking the layer's structure.

    dense: W'        low rank k: the nearest map of rank k        sparse, N:M, masked: W' on the support of W
    codes: W' on codes of as many bits        anything else: the sum or product itself, exact

and how far that is from W', as |W' - merged| / |W' - W|: what the merge loses of what the adapter changed.

Near is in the Frobenius norm, or, where moments of the layer's inputs are given, by what comes out on those inputs:

    |M|^2 = tr(M G M^T),    G = (1 - a) E[x x^T] + a tr(E[x x^T]) / n I,    a = 1e-3

The small isotropic part keeps what the inputs do not show as near as it can, and leaves E|M x|^2 on them never larger
than the Frobenius norm's choice does: that choice is the best of the isotropic part already. For a low rank it is
reduced-rank regression, on a support conjugate gradients from W' there, for codes their feedback (as in GPTQ) on scales
found anew, unless the plain codes are better.
"""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from eckart.fit import Metric, error_of, metric, regress
from eckart.fit.pruned import improve_values
from eckart.fit.quantize import Coding, Levels, quantize
from eckart.hosts import AdaptedHost, map_of
from eckart.linalg import svd_of_product, truncated_svd
from eckart.maps import NM, Bitmap, Dense, LinearMap, LowRank, Masked, Quantized, Sparse, Sum
from eckart.stats import Moments

# Share of G that is isotropic.
ISOTROPIC = 1e-3
KEPT = Dense, LowRank, Sparse, NM, Bitmap, Masked, Quantized


def merged(layer: AdaptedHost, inputs: Moments | None = None) -> tuple[nn.Module, float]:
    """Return a module of the base's structure nearest to the adapted layer, and the share of the change it loses.

    Args:
        layer: the layer with its active adapters.
        inputs: moments of what it sees, to be near on that; None for the Frobenius norm.

    Raises:
        EckartError: if an active adapter depends on its input, so that no matrix stands for it.
    """
    base, dtype = map_of(layer.base), map_of(layer.base).dtype
    wide = torch.promote_types(dtype, torch.float32)
    near = None if inputs is None else metric(inputs.second, input_shrinkage=ISOTROPIC)
    with torch.no_grad():
        target = layer.held_map().to(wide)
        made = (_like(base, target) if near is None else _like_on(base, target, near)).to(dtype)
        module = layer.hosted(made.apply(lambda t: t.detach()), None if layer.offset is None else layer.offset.detach())
        if type(made) not in KEPT:
            return module, 0.0
        full, start, got = (map_.to(wide).dense() for map_ in (target, base, made))
        seen = Metric(inputs=None if inputs is None else inputs.second)
        change, lost = (error_of(full, other, seen) ** 0.5 for other in (start, got))
    return module, lost / change if change > 0 else lost


def _like(base: LinearMap, target: LinearMap) -> LinearMap:
    """Return the map of the base's structure nearest to another map."""
    match base:
        case Dense():
            return Dense(target.dense())
        case LowRank():
            pairs = _factors(target)
            rank = base.rank
            found = truncated_svd(target.dense(), rank) if pairs is None else svd_of_product(pairs, rank)
            root = found.values.sqrt()
            return LowRank(found.left * root, root[:, None] * found.right)
        case Sparse() | NM() | Bitmap():
            return _on_support(base, target.dense())
        case Masked():
            return Masked(Dense(target.dense() * base.present()), base.mask)
        case Quantized():
            return quantize(target.dense(), _coding(base), axis=base.axis)
        case _:
            return target


def _like_on(base: LinearMap, target: LinearMap, near: Metric) -> LinearMap:
    """Return the map of the base's structure whose outputs are nearest to another map's on the inputs of a metric."""
    plain = _like(base, target)
    match base:
        case LowRank():
            return regress(target.dense(), near, rank=base.rank).factors(base.rank)
        case Sparse() | NM() | Bitmap() | Masked():
            full = target.dense().double()
            ones = base.present().double() if isinstance(base, Masked) else _on_support(base, None).dense()
            values = improve_values(plain.dense().double(), ones, full, near)
            return Masked(Dense(values), base.mask) if isinstance(base, Masked) else _on_support(base, values)
        case Quantized():
            full = target.dense()
            fed = quantize(full, _coding(base), near.inputs, axis=base.axis)
            return min(plain, fed, key=lambda codes: error_of(full, codes.dense(), near))
        case _:
            return plain


def _factors(map_: LinearMap) -> list[tuple[Tensor, Tensor]] | None:
    """Return the thin factors of a sum of low-rank maps; None if there is anything else in it."""
    match map_:
        case LowRank(up, down):
            return [(up, down)]
        case Sum(maps):
            parts = [_factors(part) for part in maps]
            return None if any(p is None for p in parts) else [pair for part in parts for pair in part or ()]
        case _:
            return None


def _on_support(base: LinearMap, dense: Tensor | None) -> LinearMap:
    """Return a sparse map with the entries of a matrix in place of its own, or ones, in float64, for None.

    Every value stands in one place of the matrix, so the adjoint of writing values out reads them back.
    """
    if dense is None:
        ones = torch.ones_like(cast(Any, base).values, dtype=torch.float64)
        return cast(LinearMap, dataclasses.replace(cast(Any, base), values=ones))
    values = cast(Any, base).values.to(dense.dtype)

    def written(v: Tensor) -> Tensor:
        return cast(LinearMap, dataclasses.replace(cast(Any, base), values=v)).dense()

    read = cast(Any, torch.func.vjp(written, values))[1]
    return cast(LinearMap, dataclasses.replace(cast(Any, base), values=read(dense)[0]))


def _coding(base: Quantized) -> Coding:
    """Return how the codes of a map were made, as far as they tell."""
    levels: Levels = "uniform" if base.levels is None else "learned"
    return Coding(base.bits, base.group_size, symmetric=base.zero is None, levels=levels)
