"""Rewrites that make a map cheaper and change nothing else: a table of rules, each with its equation.

`A + B` never simplifies by itself; `simplify` is called. A rule that would cost more anywhere is not applied: it may
not store more numbers or bytes (two maps that share a tensor store it once), nor take more operations.
"""

import math
from collections.abc import Callable

import torch

from eckart.maps.base import Blocks, LinearMap, Product, Scaled, Sum
from eckart.maps.dense import Dense, Diagonal
from eckart.maps.lowrank import LowRank
from eckart.maps.permutation import Permutation

Rule = Callable[[LinearMap], LinearMap | None]


def _scaled(map_: LinearMap) -> LinearMap | None:
    match map_:
        case Scaled(inner, 1.0):  # 1 A -> A
            return inner
        case Scaled(Scaled(inner, a), b) if math.isfinite(a * b):  # b (a A) -> (a b) A
            return Scaled(inner, a * b)
        case Scaled(Dense(w), a):  # a W -> (a W)
            return Dense(a * w)
        case Scaled(Diagonal(d), a):  # a diag(d) -> diag(a d)
            return Diagonal(a * d)
        case Scaled(LowRank(u, v), a):  # a (U V) -> (a U) V
            return LowRank(a * u, v)
    return None


def _nested(map_: LinearMap) -> LinearMap | None:
    match map_:
        case Sum((only,)) | Product((only,)) | Blocks(((only,),)):  # one term, factor or block -> itself
            return only
        case Sum(maps) if any(isinstance(m, Sum) for m in maps):  # (A + B) + C -> A + B + C
            return Sum(tuple(t for m in maps for t in (m.maps if isinstance(m, Sum) else (m,))))
        case Product(maps) if any(isinstance(m, Product) for m in maps):  # (A B) C -> A B C
            return Product(tuple(t for m in maps for t in (m.maps if isinstance(m, Product) else (m,))))
    return None


def _pair_sum(a: LinearMap, b: LinearMap) -> LinearMap | None:
    match a, b:
        case Dense(v), Dense(w):  # V + W -> (V + W)
            return Dense(v + w)
        case Diagonal(c), Diagonal(d):  # diag(c) + diag(d) -> diag(c + d)
            return Diagonal(c + d)
        case LowRank(u, v), LowRank(s, t):  # U V + S T -> [U S] [V; T]
            return LowRank(torch.cat((u, s), 1), torch.cat((v, t), 0))
        case Dense(w), LowRank() | Diagonal():  # W + B -> (W + B)
            return Dense(w + b.dense())
        case ((LowRank() | Diagonal()), Dense(w)):  # A + W -> (A + W)
            return Dense(a.dense() + w)
    return None


def _pair_product(a: LinearMap, b: LinearMap) -> LinearMap | None:
    match a, b:
        case Diagonal(c), Diagonal(d):  # diag(c) diag(d) -> diag(c d)
            return Diagonal(c * d)
        case Permutation(p), Permutation(q):  # P Q -> (P Q), (P Q x)_i = x_{q[p[i]]}
            return Permutation(q[p.long()])
        case Diagonal(d), Dense(w):  # diag(d) W -> (d_i W_ij)
            return Dense(d[:, None] * w)
        case Dense(w), Diagonal(d):  # W diag(d) -> (W_ij d_j)
            return Dense(w * d)
        case Permutation(p), Dense(w):  # P W -> rows of W reordered
            return Dense(w[p.long()])
        case Dense(v), Dense(w):  # V W -> (V W), where that is smaller
            return Dense(v @ w)
        case Dense() | Diagonal() | Permutation(), LowRank(u, v):  # A (U V) -> (A U) V
            return LowRank(a(u.mT).mT, v)
        case LowRank(u, v), Dense() | Diagonal() | Permutation():  # (U V) B -> U (V B)
            return LowRank(u, b.T(v))
        case LowRank(u, v), LowRank(s, t):  # U V S T -> U ((V S) T) or (U (V S)) T, the smaller rank
            middle = v @ s
            return LowRank(u @ middle, t) if s.shape[1] < v.shape[0] else LowRank(u, middle @ t)
    return None


def _neighbours(pair: Callable[[LinearMap, LinearMap], LinearMap | None], of: type[Sum] | type[Product]) -> Rule:
    def rule(map_: LinearMap) -> LinearMap | None:
        if not isinstance(map_, of):
            return None
        maps = map_.maps
        for i in range(len(maps) - 1):
            merged = pair(maps[i], maps[i + 1])
            if merged is not None and merged.numbers <= maps[i].numbers + maps[i + 1].numbers:
                return of((*maps[:i], merged, *maps[i + 2 :]))
        return None

    return rule


def _factored_scale(map_: LinearMap) -> LinearMap | None:
    match map_:
        case Product(maps) if any(isinstance(m, Scaled) for m in maps):  # A (a B) -> a (A B)
            scale = math.prod(m.scale for m in maps if isinstance(m, Scaled))
            if not math.isfinite(scale):
                return None
            return Scaled(Product(tuple(m.map if isinstance(m, Scaled) else m for m in maps)), scale)
    return None


RULES: tuple[Rule, ...] = (
    _nested,
    _scaled,
    _factored_scale,
    _neighbours(_pair_sum, Sum),
    _neighbours(_pair_product, Product),
)


# Operations are compared for these numbers of input vectors, one in each regime of the maps that switch between two.
TOKENS = (1, 4, 1024)


def simplify(map_: LinearMap) -> LinearMap:
    """Apply the rules, inside out, until none applies; the value is unchanged and no cost is raised."""
    inner = _inside(map_)
    if _no_dearer(inner, map_):  # dearer if parts that shared a tensor no longer do
        map_ = inner
    for rule in RULES:
        changed = rule(map_)
        if changed is not None and _no_dearer(changed, map_):
            return simplify(changed)
    return map_


def _no_dearer(new: LinearMap, old: LinearMap) -> bool:
    stored = new.numbers <= old.numbers and new.nbytes <= old.nbytes
    return stored and all(new.flops(tokens) <= old.flops(tokens) for tokens in TOKENS)


def _inside(map_: LinearMap) -> LinearMap:
    match map_:
        case Sum(maps):
            return Sum(tuple(map(simplify, maps)))
        case Product(maps):
            return Product(tuple(map(simplify, maps)))
        case Scaled(inner, scale):
            return Scaled(simplify(inner), scale)
        case Blocks(grid):
            return Blocks(tuple(tuple(map(simplify, row)) for row in grid))
    return map_
