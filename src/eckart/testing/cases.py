"""Instances of every family of maps: full, asymmetric, rectangular, 1 x 1 and rank 0, each beside its matrix.

The matrices are made by plain torch from the formula in the family's docstring, never by the map's own code.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from eckart.maps import (
    FAMILIES,
    NM,
    Bitmap,
    Blocks,
    Cayley,
    Dense,
    Diagonal,
    Hadamard,
    Householder,
    Interleaved,
    Kronecker,
    LinearMap,
    LowRank,
    Masked,
    Permutation,
    Pivoted,
    Placement,
    Product,
    Quantized,
    RowNormalized,
    Scaled,
    Scattered,
    Selection,
    Sparse,
    Sum,
    TensorTrain,
    Tiled,
    Tucker,
    packed,
)
from eckart.testing.case import Case

Made = Iterator[tuple[str, LinearMap, Tensor]]
SHAPES = ((5, 3), (3, 5), (4, 4), (1, 1))


def cases(family: str | None = None, seed: int = 0) -> list[Case]:
    """Return the cases of one family by name, or of all; the same for the same seed."""
    names = list(MAKERS) if family is None else [family]
    out = []
    for name in names:
        generator = torch.Generator().manual_seed(seed)
        made = MAKERS[name](lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64), generator)  # noqa: B023
        for label, map_, matrix in made:
            numbers = matrix.numel() if name == "Quantized" else None  # one per entry, however few its bits
            out.append(Case(f"{name} {label}", map_, matrix, FAMILIES, numbers))
    return out


Normal = Callable[..., Tensor]


def _dense(normal: Normal, generator: Generator) -> Made:
    for m, n in SHAPES:
        w = normal(m, n)
        yield f"{m}x{n}", Dense(w.clone()), w
    yield "zero", Dense(torch.zeros(3, 4, dtype=torch.float64)), torch.zeros(3, 4, dtype=torch.float64)


def _diagonal(normal: Normal, generator: Generator) -> Made:
    for n in (4, 1):
        d = normal(n)
        yield f"{n}", Diagonal(d), d * torch.eye(n, dtype=torch.float64)
    yield "zero", Diagonal(0 * normal(3)), 0 * normal(3, 3)


def _permutation(normal: Normal, generator: Generator) -> Made:
    for n, dtype in ((5, torch.int64), (4, torch.int32), (1, torch.int64)):
        order = torch.randperm(n, generator=generator)
        w = torch.zeros(n, n, dtype=torch.float64)
        w[torch.arange(n), order] = 1
        yield f"{n} {str(dtype)[6:]}", Permutation(order.to(dtype)), w


def _places(generator: Generator) -> Iterator[tuple[str, Tensor, Tensor]]:
    for k, n, dtype in ((3, 5, torch.int64), (4, 4, torch.int32), (1, 1, torch.int64), (0, 3, torch.int32)):
        places = torch.randperm(n, generator=generator)[:k].sort().values
        w = torch.zeros(k, n, dtype=torch.float64)
        w[torch.arange(k), places] = 1
        yield f"{k} of {n} {str(dtype)[6:]}", places.to(dtype), w


def _selection(normal: Normal, generator: Generator) -> Made:
    for label, places, w in _places(generator):
        yield label, Selection(places, w.shape[1]), w


def _placement(normal: Normal, generator: Generator) -> Made:
    for label, places, w in _places(generator):
        yield label, Placement(places, w.shape[1]), w.mT.contiguous()


def _lowrank(normal: Normal, generator: Generator) -> Made:
    for m, n, k in ((5, 3, 2), (3, 5, 2), (4, 4, 4), (1, 1, 1), (4, 3, 0), (2, 3, 4)):
        up, down = normal(m, k), normal(k, n)
        yield f"{m}x{n} rank {k}", LowRank(up, down), torch.einsum("ik,kj->ij", up, down)


def _pivoted(normal: Normal, generator: Generator) -> Made:
    for m, n, k in ((5, 3, 2), (3, 5, 2), (3, 4, 3), (1, 1, 1), (4, 3, 0)):
        order = torch.randperm(m, generator=generator)
        basis, coefficients = normal(k, n), normal(m - k, k)
        # y = gather([p; C p]) by rows; the adjoint layout by columns: x[order] is [pivots; rest].
        w = torch.cat((basis, torch.einsum("ik,kj->ij", coefficients, basis)))[order]
        yield f"rows {m}x{n} rank {k}", Pivoted(basis, coefficients, order.to(torch.int32), "rows"), w
        columns = torch.empty(n, m, dtype=torch.float64)
        columns[:, order] = torch.cat((basis, torch.einsum("ik,kj->ij", coefficients, basis))).mT
        held = Pivoted(basis.mT.contiguous(), coefficients.mT.contiguous(), order.to(torch.int32), "columns")
        yield f"columns {n}x{m} rank {k}", held, columns


def _sparse(normal: Normal, generator: Generator) -> Made:
    for m, n in SHAPES:
        w = normal(m, n)
        w[torch.rand(m, n, generator=generator) < 0.4] = 0
        w[m // 2] = 0 if m > 1 else 1  # an empty row
        yield f"{m}x{n}", _compressed_rows(w), w
    yield "empty", _compressed_rows(torch.zeros(2, 3, dtype=torch.float64)), torch.zeros(2, 3, dtype=torch.float64)


def _compressed_rows(w: Tensor) -> Sparse:
    entries = [(float(w[i, j]), j) for i in range(w.shape[0]) for j in range(w.shape[1]) if w[i, j] != 0]
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), (w != 0).sum(1).cumsum(0)))
    columns = torch.tensor([j for _, j in entries], dtype=torch.int32)
    values = torch.tensor([value for value, _ in entries], dtype=torch.float64)
    return Sparse(values, columns, starts.to(torch.int32), w.shape[1])


def _nm(normal: Normal, generator: Generator) -> Made:
    for m, n, keep, period in ((3, 8, 2, 4), (4, 4, 1, 2), (5, 4, 1, 4), (1, 1, 1, 1)):
        values = normal(m, n // period, keep)
        picks = [torch.randperm(period, generator=generator)[:keep].sort().values for _ in range(m * n // period)]
        places = torch.stack(picks).view(m, n // period, keep)
        w = torch.zeros(m, n, dtype=torch.float64)
        for i, group, slot in torch.cartesian_prod(*(torch.arange(size) for size in values.shape)).tolist():
            w[i, group * period + int(places[i, group, slot])] = values[i, group, slot]
        yield f"{m}x{n} {keep}:{period}", NM(values, places.to(torch.uint8), period), w
    yield "zero", NM(0 * normal(2, 1, 2), torch.tensor([[[0, 3]], [[1, 2]]], dtype=torch.uint8), 4), 0 * normal(2, 4)


def _kronecker(normal: Normal, generator: Generator) -> Made:
    for terms, left, right in ((1, (2, 3), (3, 1)), (2, (2, 1), (2, 3)), (3, (2, 2), (1, 2)), (1, (1, 1), (1, 1))):
        a, b = normal(terms, *left), normal(terms, *right)
        w = sum(torch.kron(p, q) for p, q in zip(a, b, strict=True))
        yield f"{terms} x {left} {right}", Kronecker(a, b), torch.as_tensor(w)
    yield "no terms", Kronecker(normal(0, 2, 1), normal(0, 1, 3)), 0 * normal(2, 3)


def _householder(normal: Normal, generator: Generator) -> Made:
    for r, n in ((1, 4), (3, 5), (4, 2), (1, 1), (0, 3)):
        u, w = normal(r, n), torch.eye(n, dtype=torch.float64)
        for vector in u:
            w = w - 2 * torch.outer(w @ vector, vector) / (vector @ vector)
        yield f"{r} of {n}", Householder(u), w


def _cayley(normal: Normal, generator: Generator) -> Made:
    for b, s in ((1, 4), (3, 2), (2, 3), (1, 1)):
        q = normal(b, s * (s - 1) // 2)
        blocks = []
        for entries in q:
            skew = torch.zeros(s, s, dtype=torch.float64)
            above = [(i, j) for i in range(s) for j in range(i + 1, s)]
            for (i, j), value in zip(above, entries, strict=True):
                skew[i, j], skew[j, i] = value, -value
            eye = torch.eye(s, dtype=torch.float64)
            blocks.append((eye + skew) @ torch.linalg.inv(eye - skew))
        yield f"{b} of {s}", Cayley(q, s), torch.block_diag(*blocks)


def _tiled(normal: Normal, generator: Generator) -> Made:
    for m, r, n in ((5, 2, 4), (3, 2, 5), (4, 3, 3), (1, 1, 1)):
        d = normal(m, r)
        yield f"{m}x{n} by {r}", Tiled(d, n), torch.stack([d[:, i % r] for i in range(n)], dim=1)


def _tensor_train(normal: Normal, generator: Generator) -> Made:
    for heights, widths, ranks in (
        ((2, 3), (1, 2), (1, 2, 1)),
        ((3, 1, 1), (1, 2, 2), (1, 3, 2, 1)),
        ((2, 1, 2), (3, 2, 1), (1, 2, 4, 1)),
        ((3,), (4,), (1, 1)),
        ((1,), (1,), (1, 1)),
    ):
        sides = zip(pairwise(ranks), heights, widths, strict=True)
        cores = [normal(before, m, n, after) for (before, after), m, n in sides]
        rows, columns = ([*itertools.product(*map(range, sizes))] for sizes in (heights, widths))
        w = torch.empty(len(rows), len(columns), dtype=torch.float64)
        for i, j in itertools.product(range(len(rows)), range(len(columns))):
            chain = torch.ones(1, 1, dtype=torch.float64)
            for core, row, column in zip(cores, rows[i], columns[j], strict=True):
                chain = chain @ core[:, row, column]
            w[i, j] = chain[0, 0]
        yield f"{heights} x {widths}", TensorTrain(torch.cat([c.flatten() for c in cores]), heights, widths, ranks), w


def _tucker(normal: Normal, generator: Generator) -> Made:
    for heights, widths, ranks in (
        ((4,), (3, 2, 2), (2, 2, 1, 3)),
        ((2, 3), (3, 2), (2, 1, 3, 4)),
        ((5,), (3,), (2, 3)),
        ((1,), (1,), (1, 1)),
    ):
        core, sizes = normal(*ranks), (*heights, *widths)
        factors = [normal(size, rank) for size, rank in zip(sizes, ranks, strict=True)]
        letters = "abcdefgh"
        inner, outer = letters[: len(sizes)], letters.upper()[: len(sizes)]
        terms = ",".join([inner, *(up + low for up, low in zip(outer, inner, strict=True))])
        w = torch.einsum(f"{terms}->{outer}", core, *factors)
        entries = torch.cat([part.flatten() for part in (core, *factors)])
        yield f"{heights} x {widths}", Tucker(entries, heights, widths, ranks), w.reshape(math.prod(heights), -1)


def _bitmap(normal: Normal, generator: Generator) -> Made:
    for m, n, count in ((3, 8, 2), (13, 11, 5), (2, 3, 3), (3, 17, 1), (1, 1, 1), (2, 9, 0)):
        values = normal(m, count)
        bits, w = torch.zeros(m, -(-n // 8), dtype=torch.uint8), torch.zeros(m, n, dtype=torch.float64)
        for i in range(m):
            for slot, j in enumerate(torch.randperm(n, generator=generator)[:count].sort().values.tolist()):
                bits[i, j // 8] += 2 ** (j % 8)
                w[i, j] = values[i, slot]
        yield f"{m}x{n} {count} per row", Bitmap(values, bits, n, count), w


def _scattered(normal: Normal, generator: Generator) -> Made:
    for label, held, w in _bitmap(normal, generator):
        if not isinstance(held, Bitmap):
            raise AssertionError("the cases of Bitmap are bitmaps")
        values: LinearMap = Dense(held.values)
        yield label, Scattered(values, held.bits, held.width), w
        if label.startswith("13x11"):
            up, down = normal(13, 2), normal(2, 5)
            matrix = torch.zeros_like(w)
            matrix[w != 0] = (up @ down).flatten()
            yield f"{label}, low rank", Scattered(LowRank(up, down), held.bits, held.width), matrix


def _quantized(normal: Normal, generator: Generator) -> Made:
    for m, n, bits, group, kind in (
        (3, 5, 4, 2, "zero"),
        (5, 3, 3, 2, "plain"),
        (4, 11, 3, 4, "levels"),
        (2, 4, 2, 4, "levels and zero"),
        (3, 4, 8, 3, "zero"),
        (4, 3, 5, 2, "plain"),
        (3, 5, 6, 5, "zero"),
        (1, 1, 2, 1, "plain"),
        (2, 3, 4, 5, "no codes"),
    ):
        codes = torch.randint(2**bits, (m, n), generator=generator) * (kind != "no codes")
        scale, zero, levels = normal(m, -(-n // group)), normal(m, -(-n // group)), normal(m, 2**bits)
        data, w = torch.zeros(m, -(-bits * n // 8), dtype=torch.uint8), torch.zeros(m, n, dtype=torch.float64)
        for i, j in torch.cartesian_prod(torch.arange(m), torch.arange(n)).tolist():
            code = int(codes[i, j])
            for at in range(bits):
                data[i, (bits * j + at) // 8] += (code >> at & 1) << (bits * j + at) % 8
            value = levels[i, code] if "levels" in kind else code - 2 ** (bits - 1)
            w[i, j] = scale[i, j // group] * value + zero[i, j // group] * ("zero" in kind)
        parts = zero if "zero" in kind else None, levels if "levels" in kind else None
        yield f"{m}x{n} {bits} bits, {kind}", Quantized(data, scale, *parts, n, bits, group), w
        if m != n:
            held = Quantized(data.clone(), scale.clone(), *parts, n, bits, group, "columns")
            yield f"columns {n}x{m} {bits} bits, {kind}", held, w.mT.contiguous()


def _sum(normal: Normal, generator: Generator) -> Made:
    w, up, down, d = normal(4, 3), normal(4, 2), normal(2, 3), normal(3)
    yield "dense + lowrank", Sum((Dense(w), LowRank(up, down))), w + up @ down
    yield "of one", Sum((Dense(w),)), w
    v, square = normal(3, 3), normal(3, 3)
    held = Sum((Diagonal(d), Dense(v), Product((Dense(square), Diagonal(d)))))
    yield "of three", held, torch.diag(d) + v + square * d
    yield "1x1", Sum((Dense(normal(1, 1) * 0 + 2), Diagonal(normal(1) * 0 + 3))), normal(1, 1) * 0 + 5
    shared = Dense(w)
    yield "with itself", Sum((shared, shared)), 2 * w
    wide = Sum((LowRank(down.mT.contiguous(), up.mT.contiguous()), Dense(w.mT.contiguous())))
    yield "wide", wide, (w + up @ down).mT
    factors = LowRank(up, down)
    yield "scaled, shared", Sum((Scaled(factors, 2.0), Scaled(factors, 3.0))), 5 * up @ down


def _product(normal: Normal, generator: Generator) -> Made:
    a, b, d = normal(5, 2), normal(2, 3), normal(3)
    order = torch.randperm(3, generator=generator)
    p = torch.eye(3, dtype=torch.float64)[order]
    yield "thin", Product((Dense(a), Dense(b))), a @ b
    yield "wide", Product((Dense(b), Diagonal(d))), b * d
    yield "of four", Product((Dense(a), Dense(b), Permutation(order), Diagonal(d))), a @ b @ p * d
    yield "of one", Product((Dense(a),)), a
    yield "1x1", Product((Dense(d[:1, None]), Diagonal(d[1:2]))), (d[0] * d[1]).reshape(1, 1)
    u, v, s, t = normal(4, 2), normal(2, 3), normal(3, 1), normal(1, 5)
    yield "of low ranks", Product((LowRank(u, v), LowRank(s, t))), u @ v @ s @ t
    yield "rank 0", Product((Dense(normal(3, 0)), Dense(normal(0, 4)))), 0 * normal(3, 4)


def _scaled(normal: Normal, generator: Generator) -> Made:
    for scale in (-1.5, 1.0, 0.0):
        w = normal(3, 4)
        yield f"{scale}", Scaled(Dense(w), scale), scale * w
    basis, coefficients = normal(2, 3), normal(2, 2)
    order = torch.tensor([2, 0, 3, 1])
    held = Scaled(Pivoted(basis, coefficients, order.to(torch.int32), "rows"), 0.1)
    yield "pivoted", held, 0.1 * torch.cat((basis, coefficients @ basis))[order]
    yield "1x1", Scaled(Diagonal(torch.ones(1, dtype=torch.float64)), 3.0), torch.full((1, 1), 3.0, dtype=torch.float64)


def _blocks(normal: Normal, generator: Generator) -> Made:
    a, b, c, d, up, down = normal(2, 3), normal(2, 1), normal(4, 1), normal(3), normal(4, 1), normal(1, 3)
    grid = ((Dense(a), Dense(b)), (LowRank(up, down), Dense(c)))
    yield "2 x 2", Blocks(grid), torch.cat((torch.cat((a, b), 1), torch.cat((up @ down, c), 1)))
    yield "row", Blocks(((Diagonal(d), Scaled(Diagonal(d), 2.0)),)), torch.cat((torch.diag(d), 2 * torch.diag(d)), 1)
    yield "column", Blocks(((Dense(a),), (Diagonal(d),))), torch.cat((a, torch.diag(d)))
    yield "1 x 1", Blocks(((Dense(c),),)), c
    yield "of numbers", Blocks(((Dense(c[:1]),),)), c[:1]


def _interleaved(normal: Normal, generator: Generator) -> Made:
    a, b, up, down = normal(2, 3), normal(1, 3), normal(3, 1), normal(1, 3)
    low = up @ down
    held = Interleaved((Dense(a), Dense(b), LowRank(up, down)), torch.tensor([2, 0, 1, 2, 2, 0], dtype=torch.uint8))
    yield "of three", held, torch.stack((low[0], a[0], b[0], low[1], low[2], a[1]))
    wide = Interleaved((Dense(b), Scaled(Dense(a[:1]), 2.0)), torch.tensor([1, 0], dtype=torch.uint8))
    yield "wide", wide, torch.stack((2 * a[0], b[0]))
    yield "one map without rows", Interleaved((Dense(a[:0]), Dense(a)), torch.ones(2, dtype=torch.uint8)), a
    yield "1x1", Interleaved((Dense(b[:, :1]),), torch.zeros(1, dtype=torch.uint8)), b[:, :1]


def _row_normalized(normal: Normal, generator: Generator) -> Made:
    w, up, down, size = normal(4, 3), normal(4, 2), normal(2, 3), normal(4)

    def wanted(direction: Tensor) -> Tensor:
        return size[:, None] * F.normalize(direction, dim=1)

    yield "dense", RowNormalized(size, Dense(w)), wanted(w)
    yield "low-rank", RowNormalized(size, LowRank(up, down)), wanted(up @ down)
    yield "wide", RowNormalized(size[:3], Dense(w.mT.contiguous())), size[:3, None] * F.normalize(w.mT, dim=1)
    yield "dense + low-rank", RowNormalized(size, Sum((Dense(w), LowRank(up, down)))), wanted(w + up @ down)
    yield "1x1", RowNormalized(size[:1], Dense(w[:1, :1])), size[:1, None] * w[:1, :1].sign()
    yield "rank 0", RowNormalized(size, LowRank(normal(4, 0), normal(0, 3))), 0 * w
    order = torch.tensor([2, 0, 3, 1])
    yield "permutation", RowNormalized(size, Permutation(order)), size[:, None] * torch.eye(4, dtype=size.dtype)[order]
    d = normal(4)
    yield "diagonal", RowNormalized(size, Scaled(Diagonal(d), -2.0)), torch.diag(-size * d.sign())


def _masked(normal: Normal, generator: Generator) -> Made:
    for m, n in SHAPES:
        w, mask = normal(m, n), torch.rand(m, n, generator=generator) < 0.6
        yield f"{m}x{n}", Masked(Dense(w), mask), w * mask
        yield f"{m}x{n} bits", Masked(Dense(w), packed(mask)), w * mask
    up, down, mask = normal(3, 2), normal(2, 5), torch.rand(3, 5, generator=generator) < 0.6
    yield "low-rank", Masked(LowRank(up, down), mask), (up @ down) * mask
    d = normal(3)
    one_sided = torch.ones(3, 3, dtype=torch.bool).tril()
    yield "sum", Masked(Sum((Diagonal(d), Dense(normal(3, 3) * 0 + 1))), one_sided), (torch.diag(d) + 1).tril()
    yield "none", Masked(Dense(normal(2, 3)), torch.zeros(2, 3, dtype=torch.bool)), 0 * normal(2, 3)


def _hadamard(normal: Normal, generator: Generator) -> Made:
    for m, n in SHAPES:
        a, b = normal(m, n), normal(m, n)
        yield f"{m}x{n}", Hadamard(Dense(a), Dense(b)), a * b
    u, v, s, t = normal(5, 2), normal(2, 4), normal(5, 3), normal(3, 4)
    yield "low-rank", Hadamard(LowRank(u, v), LowRank(s, t)), torch.einsum("ik,kj,il,lj->ij", u, v, s, t)
    d, w = normal(3), normal(3, 3)
    yield "diagonal", Hadamard(Diagonal(d), Dense(w)), torch.diag(d * w.diagonal())
    nothing = Hadamard(LowRank(normal(2, 0), normal(0, 3)), Dense(normal(2, 3)))
    yield "rank 0", nothing, torch.zeros(2, 3, dtype=torch.float64)


def _nested(normal: Normal, generator: Generator) -> Made:
    w, up, down, d, size = normal(4, 5), normal(4, 2), normal(2, 5), normal(4), normal(4)
    adapted = Sum((Dense(w), Scaled(LowRank(up, down), 0.5)))
    change = 0.5 * up @ down
    yield "scaled adapter", adapted, w + change
    folded = F.normalize(w + up @ down, dim=1) * size[:, None]
    held = Product((Diagonal(d), RowNormalized(size, Sum((Dense(w), LowRank(up, down))))))
    yield "diagonal @ normalized", held, d[:, None] * folded
    left, right = normal(4, 2), normal(2, 3)
    block = Blocks(((adapted, Product((Dense(left), Dense(right)))),))
    yield "blocks of sums and products", block, torch.cat((w + change, left @ right), 1)
    turned = Product((Scaled(Dense(left.mT.contiguous()), -1.0), adapted))
    yield "product of scaled and sum", turned, -left.mT @ (w + change)


MAKERS: dict[str, Callable[[Normal, Generator], Made]] = {
    "Dense": _dense,
    "Diagonal": _diagonal,
    "Permutation": _permutation,
    "Selection": _selection,
    "Placement": _placement,
    "LowRank": _lowrank,
    "Pivoted": _pivoted,
    "Sparse": _sparse,
    "NM": _nm,
    "Kronecker": _kronecker,
    "Householder": _householder,
    "Cayley": _cayley,
    "Tiled": _tiled,
    "TensorTrain": _tensor_train,
    "Tucker": _tucker,
    "Bitmap": _bitmap,
    "Scattered": _scattered,
    "Quantized": _quantized,
    "Sum": _sum,
    "Product": _product,
    "Scaled": _scaled,
    "Blocks": _blocks,
    "Interleaved": _interleaved,
    "RowNormalized": _row_normalized,
    "Masked": _masked,
    "Hadamard": _hadamard,
    "nested": _nested,
}
