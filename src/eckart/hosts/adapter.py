"""Adapters: what is composed with a frozen linear map, as changes that each turn one map into another.

    W' = f_k(... f_2(f_1(W)) ...)

    Plus: W + s D        Times: W R        Left: L W        Rescaled: diag(g / |rows of W|) W

Every change says both how to apply f(W) given a way to apply W, and which map f(W) is. The first runs, the second is
merged, saved and tested against. Changes of several papers compose in any order, since none looks at more of the
inner map than these two.

Legend: W the map so far (m, n); x (..., n) inputs; D, L, R the change's own maps, whose parameters train unless frozen.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from eckart.errors import EckartError
from eckart.hosts.decoding import is_plain
from eckart.hosts.host import LowRankHost, host, map_of
from eckart.linalg import factored_sum
from eckart.maps import (
    Hadamard,
    LinearMap,
    LowRank,
    Product,
    RowNormalized,
    Scaled,
    Sparse,
    Sum,
    difference_of_vectors,
    fixed_vectors,
    multiply_by_rows,
    row_norms,
    thin,
)
from eckart.maps.support import Term, multiply_sum

# Stands between two trained factors and their use: returns them, and what it does to their gradients on the way back.
GradientRule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# A factor and what is added to a weight: low-rank or sparse.
Addend = tuple[float, LowRank | Sparse]


@dataclass(frozen=True, slots=True)
class Inner:
    """The map a change is composed with.

    Attributes:
        call: x (..., n) -> W x (..., m).
        map: returns W.
        dense: weight and bias where `call` is one product with them and nothing besides; None elsewhere.
        sequences: which sequences of the batch the inputs are, or None for all of them.
    """

    call: Callable[[Tensor], Tensor]
    map: Callable[[], LinearMap]
    dense: tuple[Tensor, Tensor | None] | None = None
    sequences: Tensor | None = None

    @property
    def writable(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias where changes may be written into the weight: half precision would round small ones away."""
        wide = self.dense is not None and self.dense[0].dtype in (torch.float32, torch.float64)
        return self.dense if wide else None


def multiply_written(
    x: Tensor,
    writable: tuple[Tensor, Tensor | None],
    changed: Callable[[int, int, Sequence[Tensor], Tensor], Tensor],
    own: Sequence[Tensor],
) -> Tensor:
    """Return x (W + s D)^T + b by one product with the sum, written out a block of rows at a time and never kept.

    Args:
        x: inputs (..., n).
        writable: W (m, n) and b.
        changed: returns rows of W + s D from what D is made of and the same rows of W.
        own: what D is made of.
    """
    weight, bias = writable

    def rows(start: int, stop: int, tensors: Sequence[Tensor]) -> Tensor:
        return changed(start, stop, tensors[:-1], tensors[-1][start:stop])

    y = multiply_by_rows(x, rows, (*own, weight), weight.shape[0])
    return y if bias is None else y + bias


class Change(nn.Module):
    """One change of a linear map, W -> f(W).

    Attributes:
        keeps_bias: whether f(W) x + b can be had from a way to compute W x + b.
    """

    keeps_bias = True

    @abstractmethod
    def of(self, inner: LinearMap) -> LinearMap:
        """Return f(W)."""

    @abstractmethod
    def call(self, x: Tensor, inner: Inner) -> Tensor:
        """Return f(W) x."""


class Plus(Change):
    """W + s D.

    Attributes:
        rule: what is done to the gradients of a low-rank D's factors, or None.
    """

    rule: GradientRule | None

    def __init__(self, delta: LinearMap, scale: float = 1.0, *, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise EckartError(f"dropout must be at least 0 and less than 1, got {dropout}")
        self.delta, self.scale, self.rule = host(delta), scale, None
        self.dropout = nn.Dropout(dropout) if dropout else None

    def of(self, inner: LinearMap) -> LinearMap:
        return Sum((inner, scaled(map_of(self.delta), self.scale)))

    def call(self, x: Tensor, inner: Inner) -> Tensor:
        dropping = self.dropout is not None and self.training
        factors, writable = self.factors(), inner.writable
        if factors is None and writable is not None and not dropping:
            held = map_of(self.delta)
            if isinstance(held, Hadamard):
                return self._written(x, writable, held)
        y = inner.call(x)
        if self.dropout is not None and dropping:
            x = self.dropout(x)
        if factors is None:
            return y.add_(applied(self.delta, x), alpha=self.scale)
        up, down = factors  # what is thin is cast, never x
        return add_product(y, F.linear(x, down.to(x.dtype)), up.to(x.dtype), self.scale)

    def _written(self, x: Tensor, writable: tuple[Tensor, Tensor | None], held: Hadamard) -> Tensor:
        leaves, tree = pytree.tree_flatten(held)

        def changed(start: int, stop: int, own: Sequence[Tensor], weight: Tensor) -> Tensor:
            factors = cast(Hadamard, pytree.tree_unflatten(list(own), tree)).rows(start, stop)
            return torch.addcmul(weight, *factors, value=self.scale)

        return multiply_written(x, writable, changed, leaves)

    def addend(self) -> Addend | None:
        """Return s and D if D is low-rank, behind the gradient rule, or sparse, and its inputs are not dropped."""
        if self.dropout is not None and self.training:
            return None
        factors = self.factors()
        if factors is not None:
            return self.scale, LowRank(*factors)
        held = map_of(self.delta)
        found = held if isinstance(held, Sparse) else thin(held)
        return None if found is None else (self.scale, found)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return U and V of a low-rank D behind the gradient rule; None if D is no plain pair of linear layers."""
        delta = self.delta
        if isinstance(delta, LowRankHost) and is_plain(delta.up) and is_plain(delta.down):
            pair = delta.up.weight, delta.down.weight
            return pair if self.rule is None else self.rule(*pair)
        if self.rule is not None:
            raise EckartError(f"a gradient rule needs a plain low-rank map, got a {type(delta).__name__}")
        return None


class Times(Change):
    """W R: what comes in is changed before the layer sees it."""

    def __init__(self, right: LinearMap) -> None:
        super().__init__()
        self.right = host(right)

    def of(self, inner: LinearMap) -> LinearMap:
        return Product((inner, map_of(self.right)))

    def call(self, x: Tensor, inner: Inner) -> Tensor:
        return inner.call(applied(self.right, x))


class Left(Change):
    """L W: what comes out is changed, the bias is not."""

    keeps_bias = False

    def __init__(self, left: LinearMap) -> None:
        super().__init__()
        self.left = host(left)

    def of(self, inner: LinearMap) -> LinearMap:
        return Product((map_of(self.left), inner))

    def call(self, x: Tensor, inner: Inner) -> Tensor:
        return applied(self.left, inner.call(x))


class Rescaled(Change):
    """diag(g / |rows of W|) W: the rows keep their directions and get lengths of their own.

    The lengths of the rows of W are constants to autograd, as DoRA has it (Liu et al. 2024, section 4.3).
    """

    keeps_bias = False

    def __init__(self, magnitude: Tensor) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(magnitude)

    def of(self, inner: LinearMap) -> LinearMap:
        return RowNormalized(self.magnitude, inner)

    def call(self, x: Tensor, inner: Inner) -> Tensor:
        with torch.no_grad():
            norms = row_norms(inner.map())
        return inner.call(x) * (self.magnitude / norms.where(norms > 0, 1.0)).to(x.dtype)


class Shortcut(nn.Module):
    """A cheaper way to apply the map that an adapter is composed with, taken in training mode only."""

    @abstractmethod
    def around(self, inner: Inner) -> Inner:
        """Return W to be applied the cheaper way."""


class Adapter(nn.Module):
    """A chain of changes, applied to a map in turn: the first one nearest to it.

    Parameters that do not require gradients when it is made never train.

    Attributes:
        shortcut: how the map is applied in training mode, or None for as it is; holds buffers, no parameters.
    """

    shortcut: Shortcut | None
    _compared: tuple[tuple[tuple[int, int], ...], bool] | None

    def __init__(self, changes: Iterable[Change]) -> None:
        super().__init__()
        self.changes, self.shortcut, self._compared = nn.ModuleList(changes), None, None
        for parameter in self.parameters():  # as it is when loaded, which has to compute the same bits
            parameter.data = parameter.data.contiguous()
        self._fixed = {name for name, p in self.named_parameters() if not p.requires_grad}

    def chain(self) -> list[Change]:
        """Return the changes, the first applied first."""
        return cast(list[Change], list(self.changes))

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that the method trains, whether they do now or not."""
        return [p for name, p in self.named_parameters() if name not in self._fixed]

    def fixed(self) -> list[str]:
        """Return the names of the parameters that never train."""
        return sorted(self._fixed)

    def fix(self, change: Change) -> None:
        """Let a change never train: one of the chain, or a new one, which is put at its end."""
        if all(change is not other for other in self.changes):
            self.changes.append(change)
        own = {id(parameter) for parameter in change.requires_grad_(False).parameters()}
        # by the names there are now: the change may have got another map
        self._fixed = {name for name, p in self.named_parameters() if name in self._fixed or id(p) in own}

    def rule(self, rule: GradientRule | None) -> None:
        """Let the gradients of every trained pair of factors follow a rule, or none."""
        for change in self.chain():
            if isinstance(change, Plus) and any(p.requires_grad for p in change.parameters()):
                change.rule = rule

    def freeze(self) -> None:
        """Let nothing of it train from now on."""
        self.requires_grad_(False)
        self._fixed = {name for name, _ in self.named_parameters()}

    @property
    def keeps_bias(self) -> bool:
        """Whether every change does, and the map is applied as it is."""
        as_it_is = self.shortcut is None or not self.training
        return as_it_is and all(change.keeps_bias for change in self.chain())

    def of(self, inner: LinearMap, weight: float = 1.0) -> LinearMap:
        """Return W + w (f(W) - W)."""
        out, added = inner, [change for change in self.chain() if isinstance(change, Plus)]
        if len(added) == len(self.changes):  # W + w s D: W is there once, which row norms and merging look for
            for plus in added:
                out = Sum((out, scaled(map_of(plus.delta), weight * plus.scale)))
            return out
        for change in self.chain():
            out = change.of(out)
        return out if weight == 1.0 else Sum((scaled(inner, 1.0 - weight), scaled(out, weight)))

    def within(self, inner: Inner, weight: float = 1.0) -> Inner:
        """Return the adapted map as what a further adapter is composed with."""

        def adapted() -> LinearMap:
            return self.of(inner.map(), weight)

        return Inner(lambda x: self.call(x, inner, weight), adapted, sequences=inner.sequences)

    def call(self, x: Tensor, inner: Inner, weight: float = 1.0) -> Tensor:
        """Return (W + w (f(W) - W)) x."""
        if self.training and self.shortcut is not None:
            inner = self.shortcut.around(inner)
        current, run = inner, list[Addend]()
        for change in self._steps():
            addend = change.addend() if isinstance(change, Plus | _Difference) else None
            if addend is not None and (isinstance(addend[1], LowRank) or current.writable is not None):
                run.append(addend)
                continue
            current, run = _composed(cast(Change, change), _with_addends(current, run)), []
        if weight == 1.0:
            return _with_addends(current, run).call(x)
        if current is inner:  # nothing but sums: no second pass through W
            return _with_addends(inner, [(weight * scale, map_) for scale, map_ in run]).call(x)
        current = _with_addends(current, run)
        return torch.lerp(inner.call(x), current.call(x), weight)

    def _steps(self) -> list["Change | _Difference"]:
        """Return the changes, those that subtract what the next one started from together with that one."""
        out = list[Change | _Difference]()
        for change in self.chain():
            before = out[-1] if out else None
            if isinstance(before, Plus) and isinstance(change, Plus) and self._is_difference(before, change):
                out[-1] = _Difference(before, change)
            else:
                out.append(change)
        return out

    def _is_difference(self, before: Plus, change: Plus) -> bool:
        """Tell whether a change subtracts what the next one, thin vectors besides, adds; neither drops inputs."""
        if before.scale != -change.scale or before.dropout is not None or change.dropout is not None:
            return False
        pairs = fixed_vectors(map_of(before.delta), map_of(change.delta))
        if pairs is None:
            return False
        if torch.compiler.is_compiling() or any(t.is_inference() for pair in pairs for t in pair):
            return False
        state = tuple((t.data_ptr(), t._version) for pair in pairs for t in pair)
        if self._compared is None or self._compared[0] != state:  # once, while nobody writes into them
            self._compared = state, all(torch.equal(*pair) for pair in pairs)
        return self._compared[1]


@dataclass(frozen=True, slots=True)
class _Difference:
    """-s L S R + s (L + A B) S (R + C D)."""

    start: Plus
    moved: Plus

    def addend(self) -> Addend:
        return self.moved.scale, difference_of_vectors(cast(Product, map_of(self.moved.delta)))


def _with_addends(inner: Inner, addends: Sequence[Addend]) -> Inner:
    """Return W + s_1 D_1 + s_2 D_2 + ...: low-rank ones side by side, sparse ones written into W."""
    if not addends:
        return inner
    pairs = [(scale, map_.up, map_.down) for scale, map_ in addends if isinstance(map_, LowRank)]
    terms = [(s, m.values, m.columns, m.starts) for s, m in addends if isinstance(m, Sparse)]

    def call(x: Tensor) -> Tensor:
        if inner.dense is not None and not terms:
            return factored_sum(x, *inner.dense, pairs)
        y = _scattered(x, *inner.writable, terms) if inner.writable is not None and terms else inner.call(x)
        for scale, up, down in pairs:
            y = add_product(y, F.linear(x, down.to(x.dtype)), up.to(x.dtype), scale)
        return y

    return Inner(call, lambda: Sum((inner.map(), *(scaled(map_, scale) for scale, map_ in addends))))


def _scattered(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    y = multiply_sum(x, weight, terms)
    return y if bias is None else y + bias


def _composed(change: Change, inner: Inner) -> Inner:
    return Inner(lambda x: change.call(x, inner), lambda: change.of(inner.map()))


def applied(module: nn.Module, x: Tensor) -> Tensor:
    """Return a host's output in the dtype of x, computed in that of its parameters."""
    parameter = next(module.parameters(), x)
    y: Tensor = module(x.to(parameter.dtype))
    return y.to(x.dtype)


def scaled(map_: LinearMap, scale: float) -> LinearMap:
    """Return s W, W itself for s = 1, and a low-rank map for one: rules for row norms and merging look for it."""
    if scale == 1.0:
        return map_
    return LowRank(map_.up * scale, map_.down) if isinstance(map_, LowRank) else Scaled(map_, scale)


def add_product(y: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return y + s h U^T, written over y: y (..., m), h (..., r), U (m, r).

    Autograd keeps h and U only, and no second tensor of the size of y is made.
    """
    up = up.to(hidden.dtype)  # autocast narrows h and leaves U
    if y.dtype != hidden.dtype or not y.is_contiguous():
        return y + (scale * F.linear(hidden, up)).to(y.dtype)
    flat = y.view(-1, y.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.mT, alpha=scale)
    return flat.view(y.shape)
