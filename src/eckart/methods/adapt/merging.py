"""Merging an adapter into its layer without breaking the layer's structure.

    dense: W'        low rank k: the nearest map of rank k        sparse, N:M, masked: W' on the support of W
    codes: W' on codes of as many bits        anything else: the sum or product itself, exact

and how far that is from W', as |W' - merged|_F / |W' - W|_F: what the merge loses of what the adapter changed.
"""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from eckart.fit.quantize import Coding, Levels, quantize
from eckart.hosts import AdaptedHost, host, map_of
from eckart.linalg import svd_of_product, truncated_svd
from eckart.maps import NM, Bitmap, Dense, LinearMap, LowRank, Masked, Quantized, Sparse, Sum


def merged(layer: AdaptedHost) -> tuple[nn.Module, float]:
    """Return a module of the base's structure nearest to the adapted layer, and the share of the change it loses.

    Args:
        layer: the layer with its active adapters.

    Raises:
        EckartError: if an active adapter depends on its input, so that no matrix stands for it.
    """
    base, dtype = map_of(layer.base), map_of(layer.base).dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        target = layer.held_map().to(wide)
        made = _like(base, target).to(dtype)
        module = host(made.apply(lambda t: t.detach()), None if layer.offset is None else layer.offset.detach())
        if type(made) not in (Dense, LowRank, Sparse, NM, Bitmap, Masked, Quantized):
            return module, 0.0
        full, start, got = (map_.to(wide).dense() for map_ in (target, base, made))
        change = torch.linalg.vector_norm(full - start)
        lost = torch.linalg.vector_norm(full - got)
    return module, float(lost / change) if change > 0 else float(lost)


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


def _on_support(base: LinearMap, dense: Tensor) -> LinearMap:
    """Return a sparse map with the entries of a matrix in place of its own.

    Every value stands in one place of the matrix, so the adjoint of writing values out reads them back.
    """
    values = cast(Any, base).values.to(dense.dtype)

    def written(v: Tensor) -> Tensor:
        return cast(LinearMap, dataclasses.replace(cast(Any, base), values=v)).dense()

    read = cast(Any, torch.func.vjp(written, values))[1]
    return cast(LinearMap, dataclasses.replace(cast(Any, base), values=read(dense)[0]))


def _coding(base: Quantized) -> Coding:
    """Return how the codes of a map were made, as far as they tell."""
    levels: Levels = "uniform" if base.levels is None else "learned"
    return Coding(base.bits, base.group_size, symmetric=base.zero is None, levels=levels)
