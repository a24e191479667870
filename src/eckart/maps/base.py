"""The contract of a structured linear map, and the composites that its operators build.

    (A + B)(x) = A(x) + B(x)        (a * A)(x) = a A(x)
    (A @ B)(x) = A(B(x))            A.T is the adjoint: <A x, y> = <x, A.T y>

A map is a frozen dataclass whose fields are tensors, maps, tuples of maps, and plain numbers or strings. Everything
else derives from the fields: names and order of its tensors, moves, repr, equality, spec, loading, pytree.

Legend: W the matrix a map stands for (m, n) = (out, in); x (..., n) inputs, y (..., m) outputs.
"""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from eckart.errors import EckartError

Spec = dict[str, Any]
_Class = TypeVar("_Class", bound="type[LinearMap]")


class LinearMap(ABC):
    """A linear map y = W x given by its parts, W of shape (out, in).

    To write one: decorate a class with `@linear_map`, declare its fields, and write `shape`, `__call__` and `T`.
    `eckart.testing.check_map` then holds it to every law of the algebra.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Apply to the last axis: x (..., in) -> y (..., out), as `x @ W.T` does."""

    @property
    @abstractmethod
    def T(self) -> "LinearMap":
        """The adjoint, a map of shape (in, out)."""

    def dense(self) -> Tensor:
        """Return W as a new matrix (out, in)."""
        reference = self._reference()
        return self(torch.eye(self.shape[1], dtype=reference.dtype, device=reference.device)).mT.contiguous()

    def flops(self, tokens: int = 1) -> int:
        """Return the multiplications and additions for that many input vectors: two per stored number by default.

        What is counted is what `__call__` does, whatever fewer operations would do: n for a sum of n terms, 2 m n k for
        a product of matrices.
        """
        own = sum(t.numel() for t in _own_tensors(self).values() if t.is_floating_point())
        return 2 * tokens * own + sum(child.flops(tokens) for _, child in _children(self))

    def dense_flops(self) -> int:
        """Return the multiplications and additions of `dense`: those of applying the map to the identity by default."""
        return self.flops(self.shape[1])

    def validate(self) -> None:
        """Raise an `EckartError` if what the tensors hold cannot be, such as an index beyond the matrix.

        Sizes and dtypes are checked whenever a map is made; contents only here, which whoever reads files calls.
        """
        for _, child in _children(self):
            child.validate()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, in field order; those of inner maps are prefixed, as in "0.up"."""
        out = dict(_own_tensors(self))
        for name, child in _children(self):
            out.update({f"{name}.{key}": tensor for key, tensor in child.tensors().items()})
        return out

    @property
    def numbers(self) -> int:
        """How many numbers the map is made of: floating ones, and codes, one each however few their bits.

        A tensor that appears twice counts once. What only says how codes are read costs bytes, not numbers.
        """
        return sum({id(t): count for t, count in self.counted()}.values())

    def counted(self) -> list[tuple[Tensor, int]]:
        """Return the tensors that hold numbers, each with how many; a map with codes says what they stand for."""
        own = [(t, t.numel()) for t in _own_tensors(self).values() if t.is_floating_point()]
        return own + [pair for _, child in _children(self) for pair in child.counted()]

    @property
    def nbytes(self) -> int:
        """How many bytes are stored, index tensors included."""
        return sum(t.numel() * t.element_size() for t in _distinct(self))

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the map's numbers (float32 if it has none)."""
        return self._reference().dtype

    @property
    def device(self) -> torch.device:
        """The device of the map's tensors."""
        return next(iter(self.tensors().values()), torch.empty(0)).device

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "LinearMap":
        """Return the map with its numbers cast and all its tensors moved; index tensors keep their dtype."""
        return self.apply(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype))

    def apply(self, function: Callable[[Tensor], Tensor]) -> "LinearMap":
        """Return the map with `function` applied to each of its tensors."""
        return cast(LinearMap, pytree.tree_map(function, self))

    def spec(self) -> Spec:
        """Return a JSON tree of the structure: class, tensor shapes and plain fields, but no numbers.

        A floating tensor is written as its shape, any other as {"shape": ..., "dtype": ...}.
        """
        out: Spec = {"op": type(self).__name__}
        for field in dataclasses.fields(cast(Any, self)):
            out[field.name] = _field_spec(getattr(self, field.name))
        return out

    def __add__(self, other: "LinearMap") -> "LinearMap":
        return Sum((self, other))

    def __sub__(self, other: "LinearMap") -> "LinearMap":
        return Sum((self, Scaled(other, -1.0)))

    def __neg__(self) -> "LinearMap":
        return Scaled(self, -1.0)

    def __mul__(self, scale: float) -> "LinearMap":
        return Scaled(self, float(scale))

    __rmul__ = __mul__

    def __matmul__(self, other: "LinearMap") -> "LinearMap":
        if isinstance(other, Tensor):
            raise EckartError(f"A @ tensor is not defined for {self!r}; call the map on the last axis instead: A(x)")
        return Product((self, other))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        return self.spec() == other.spec() and all(
            t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in mine.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        inner = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(cast(Any, self))
            if not isinstance(getattr(self, f.name), (Tensor, LinearMap, tuple))
        )
        parts = ", ".join(repr(child) for _, child in _children(self))
        detail = ", ".join(part for part in (inner, parts) if part)
        head = f"{type(self).__name__}[{self.shape[0]}x{self.shape[1]}, {self.numbers:,} numbers]"
        return f"{head}({detail})" if detail else head

    def _reference(self) -> Tensor:
        for tensor in self.tensors().values():
            if tensor.is_floating_point():
                return tensor
        return torch.empty(0, device=next(iter(self.tensors().values()), torch.empty(0)).device)


def _own_tensors(map_: LinearMap) -> dict[str, Tensor]:
    return {name: value for name, value in _parts(map_) if isinstance(value, Tensor)}


def _children(map_: LinearMap) -> Iterator[tuple[str, LinearMap]]:
    return ((name, value) for name, value in _parts(map_) if isinstance(value, LinearMap))


def _parts(map_: LinearMap) -> Iterator[tuple[str, Any]]:
    """Yield tensors and inner maps with their names: the field name, or the indices alone inside a tuple."""
    for field in dataclasses.fields(cast(Any, map_)):
        yield from _parts_of(field.name, getattr(map_, field.name), top=True)


def _parts_of(name: str, value: Any, top: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _parts_of(str(i) if top else f"{name}.{i}", item, top=False)
    else:
        yield name, value


def _distinct(map_: LinearMap) -> list[Tensor]:
    return list({id(t): t for t in map_.tensors().values()}.values())


def _field_spec(value: Any) -> Any:
    if isinstance(value, LinearMap):
        return value.spec()
    if isinstance(value, tuple):
        items = [_field_spec(item) for item in value]
        # Marked, since a bare list of whole numbers is the shape of a tensor.
        return items if _is_dynamic(value) else {"tuple": items}
    if isinstance(value, Tensor):
        shape = list(value.shape)
        return shape if value.is_floating_point() else {"shape": shape, "dtype": str(value.dtype)[6:]}
    return value


@dataclass_transform(frozen_default=True)
def linear_map(cls: _Class) -> _Class:
    """Make a class a linear map: a frozen, slotted dataclass registered as a pytree (tensors are the leaves).

    Its `__call__` refuses inputs whose last axis is not `in` with an `EckartError`: some operators of torch would
    broadcast or ignore what is too much.
    """
    made = dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)(cls)
    cast(Any, made).__call__ = _checked(made.__call__)
    names = [f.name for f in dataclasses.fields(cast(Any, made))]

    def flatten(map_: Any) -> tuple[list[Any], tuple[Any, ...]]:
        values = [getattr(map_, name) for name in names]
        dynamic = [v for v in values if _is_dynamic(v)]
        return dynamic, tuple(None if _is_dynamic(v) else (v,) for v in values)

    def unflatten(dynamic: Any, context: Any) -> Any:
        leaves = iter(dynamic)
        # Not the constructor: a transform may put anything in place of a tensor, and the checks would refuse it.
        out = object.__new__(made)
        for name, static in zip(names, context, strict=True):
            object.__setattr__(out, name, next(leaves) if static is None else static[0])
        return out

    pytree.register_pytree_node(made, flatten, unflatten, serialized_type_name=f"eckart.{made.__qualname__}")
    return cast(_Class, made)


def _checked(call: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return a `__call__` that checks the last axis of its input first."""

    @functools.wraps(call)
    def checked(self: LinearMap, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.shape[1]:
            raise EckartError(f"{self!r}: got an input of shape {tuple(x.shape)}, needed (..., {self.shape[1]})")
        return call(self, x)

    return checked


def _is_dynamic(value: Any) -> bool:
    return isinstance(value, (Tensor, LinearMap)) or (
        isinstance(value, tuple) and any(_is_dynamic(item) for item in value)
    )


def require(condition: bool, operation: str, came: str, needed: str) -> None:
    """Raise an `EckartError` that says what came and what was needed, unless the condition holds."""
    if not condition:
        raise EckartError(f"{operation}: got {came}, needed {needed}")


def require_shape(name: str, tensor: Tensor, *sizes: int) -> None:
    """Raise an `EckartError` unless the tensor has exactly these sizes."""
    require(tuple(tensor.shape) == sizes, name, f"a tensor of shape {tuple(tensor.shape)}", f"shape {sizes}")


def in_one_dtype(map_: LinearMap) -> LinearMap:
    """Return a map in the widest dtype among its tensors: those of a narrow base and of its adapters must agree."""
    found = {tensor.dtype for tensor in pytree.tree_leaves(map_) if tensor.is_floating_point()}
    return map_ if len(found) < 2 else map_.to(functools.reduce(torch.promote_types, found))


@linear_map
class Sum(LinearMap):
    """W = W_1 + ... + W_p.

    Attributes:
        maps: at least one map, all of one shape.
    """

    maps: tuple[LinearMap, ...]

    def __post_init__(self) -> None:
        require(len(self.maps) > 0, "Sum", "no maps", "at least one")
        shapes = [m.shape for m in self.maps]
        require(len(set(shapes)) == 1, "Sum", f"shapes {shapes}", "maps of one shape")

    @property
    def shape(self) -> tuple[int, int]:
        return self.maps[0].shape

    def __call__(self, x: Tensor) -> Tensor:
        y = self.maps[0](x)
        for term in self.maps[1:]:
            y = y + term(x)
        return y

    @property
    def T(self) -> LinearMap:
        return Sum(tuple(m.T for m in self.maps))

    def dense(self) -> Tensor:
        out = self.maps[0].dense()
        for term in self.maps[1:]:
            out = out + term.dense()
        return out

    def flops(self, tokens: int = 1) -> int:
        return sum(m.flops(tokens) for m in self.maps) + (len(self.maps) - 1) * tokens * self.shape[0]

    def dense_flops(self) -> int:
        return sum(m.dense_flops() for m in self.maps) + (len(self.maps) - 1) * math.prod(self.shape)


@linear_map
class Product(LinearMap):
    """W = W_1 W_2 ... W_p; the last map is applied first.

    Attributes:
        maps: at least one map, inner sizes matching.
    """

    maps: tuple[LinearMap, ...]

    def __post_init__(self) -> None:
        require(len(self.maps) > 0, "Product", "no maps", "at least one")
        for left, right in zip(self.maps, self.maps[1:], strict=False):
            came = f"shapes {left.shape} @ {right.shape}"
            require(left.shape[1] == right.shape[0], "Product", came, "equal inner sizes")

    @property
    def shape(self) -> tuple[int, int]:
        return self.maps[0].shape[0], self.maps[-1].shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        for factor in reversed(self.maps):
            x = factor(x)
        return x

    @property
    def T(self) -> LinearMap:
        return Product(tuple(m.T for m in reversed(self.maps)))


@linear_map
class Scaled(LinearMap):
    """W = scale * W_1.

    Attributes:
        map: the map scaled.
        scale: a finite plain number.
    """

    map: LinearMap
    scale: float

    def __post_init__(self) -> None:
        require(math.isfinite(self.scale), "Scaled", f"scale {self.scale}", "a finite number")

    @property
    def shape(self) -> tuple[int, int]:
        return self.map.shape

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * self.map(x)

    @property
    def T(self) -> LinearMap:
        return Scaled(self.map.T, self.scale)

    def dense(self) -> Tensor:
        return self.scale * self.map.dense()

    def flops(self, tokens: int = 1) -> int:
        return self.map.flops(tokens) + tokens * self.shape[0]

    def dense_flops(self) -> int:
        return self.map.dense_flops() + math.prod(self.shape)


@linear_map
class Blocks(LinearMap):
    """W = a grid of blocks, as [[W_11, W_12], [W_21, W_22]].

    Attributes:
        grid: rows of maps; the maps of a row share their out size, those of a column their in size.
    """

    grid: tuple[tuple[LinearMap, ...], ...]

    def __post_init__(self) -> None:
        shapes = [[m.shape for m in row] for row in self.grid]
        require(len(shapes) > 0 and all(shapes), "Blocks", f"{shapes}", "at least one row and one column")
        same_rows = all(len({s[0] for s in row}) == 1 for row in shapes)
        same_columns = all([s[1] for s in row] == [s[1] for s in shapes[0]] for row in shapes)
        require(same_rows and same_columns, "Blocks", f"shapes {shapes}", "one height per row and one width per column")

    @property
    def shape(self) -> tuple[int, int]:
        return sum(row[0].shape[0] for row in self.grid), sum(m.shape[1] for m in self.grid[0])

    def __call__(self, x: Tensor) -> Tensor:
        pieces = x.split([m.shape[1] for m in self.grid[0]], dim=-1)
        outputs = []
        for row in self.grid:
            y = row[0](pieces[0])
            for block, piece in zip(row[1:], pieces[1:], strict=True):
                y = y + block(piece)
            outputs.append(y)
        return torch.cat(outputs, dim=-1)

    @property
    def T(self) -> LinearMap:
        return Blocks(tuple(tuple(m.T for m in column) for column in zip(*self.grid, strict=True)))

    def dense(self) -> Tensor:
        return torch.cat([torch.cat([m.dense() for m in row], dim=1) for row in self.grid], dim=0)

    def flops(self, tokens: int = 1) -> int:
        blocks = sum(m.flops(tokens) for row in self.grid for m in row)
        return blocks + (len(self.grid[0]) - 1) * tokens * self.shape[0]

    def dense_flops(self) -> int:
        return sum(m.dense_flops() for row in self.grid for m in row)
