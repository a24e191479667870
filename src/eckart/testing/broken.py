"""For each law a map that breaks it: a law that cannot fail proves nothing.

Each class is wrong in one way, named after what it does. `BROKEN[law]` makes a case that this law must reject.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maps import FAMILIES, Dense, Diagonal, LinearMap, Permutation, Product, Spec, linear_map, require
from eckart.testing.case import Case, normal


@linear_map
class _Right(LinearMap):
    """A dense map with nothing wrong; what follows breaks one thing each."""

    weight: Tensor

    def __post_init__(self) -> None:
        require(self.weight.ndim == 2, "a dense map", f"a weight of shape {tuple(self.weight.shape)}", "a matrix")

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    @property
    def T(self) -> LinearMap:
        return type(self)(self.weight.mT)


@linear_map
class SlightlyTooLarge(_Right):
    """Applies 1.01 W."""

    def __call__(self, x: Tensor) -> Tensor:
        return 1.01 * F.linear(x, self.weight)

    def dense(self) -> Tensor:
        return self.weight.clone()


@linear_map
class HandsOutItsWeight(_Right):
    """Returns its own tensor as dense(): whoever edits the matrix edits the map."""

    def dense(self) -> Tensor:
        return self.weight

    def dense_flops(self) -> int:
        return 0


@linear_map
class ForgetsToTranspose(_Right):
    """Is its own adjoint, though W is not symmetric."""

    @property
    def T(self) -> LinearMap:
        return self


@linear_map
class KeepsTheOrder(LinearMap):
    """W = A B, whose adjoint applies B^T A^T in the wrong order; what it writes out is right."""

    left: LinearMap
    right: LinearMap
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        return self.right(self.left(x)) if self.turned else self.left(self.right(x))

    @property
    def T(self) -> LinearMap:
        return KeepsTheOrder(self.right.T, self.left.T, not self.turned)

    def dense(self) -> Tensor:
        return Product((self.left, self.right)).dense()


@linear_map
class AddsTooMuch(_Right):
    """A + B is A + 1.01 B."""

    def __add__(self, other: LinearMap) -> LinearMap:
        return Dense(self.weight) + 1.01 * other


@linear_map
class AlwaysEqual(_Right):
    """Equals every map of its class, whatever the numbers."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AlwaysEqual)

    __hash__ = None  # type: ignore[assignment]


@linear_map
class RoundsItsScale(LinearMap):
    """W = scale V, whose spec rounds the scale."""

    weight: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.scale

    @property
    def T(self) -> LinearMap:
        return RoundsItsScale(self.weight.mT, self.scale)

    def spec(self) -> Spec:
        return {"op": "RoundsItsScale", "weight": list(self.weight.shape), "scale": round(self.scale)}


@linear_map
class AnswersInFloat32(_Right):
    """Computes in float32 and leaves the result there."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


@linear_map
class CutsTheGradient(_Right):
    """Treats its weight as a constant."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.detach())


@linear_map
class CopiesItsTensors(_Right):
    """Clones what it is given, so that a host and its map drift apart."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", self.weight.clone())


@linear_map
class BehavesOtherwiseWhenTraced(_Right):
    """Multiplies by 0.99 inside torch.compile and torch.export."""

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return 0.99 * y if torch.compiler.is_compiling() else y


@linear_map
class LooksAtItsInput(_Right):
    """Branches on a value of its input, which no batch has a single one of."""

    def __call__(self, x: Tensor) -> Tensor:
        return x * torch.inf if bool((x > 1e300).any()) else F.linear(x, self.weight)


@linear_map
class HidesItsWork(_Right):
    """States half of the operations it performs."""

    def flops(self, tokens: int = 1) -> int:
        return tokens * self.weight.numel()


@linear_map
class TakenForADiagonal(Diagonal):
    """W = 2 diag(scale), taken by the rules of `simplify` for the diagonal map it inherits from."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * x * self.scale

    def dense(self) -> Tensor:
        return 2 * torch.diag(self.scale)


@linear_map
class AcceptsAnyFactors(LinearMap):
    """W = up @ down whose sizes nobody compares: the error comes from deep inside torch."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)

    @property
    def T(self) -> LinearMap:
        return AcceptsAnyFactors(self.down.mT, self.up.mT)


def _case(make: Callable[..., LinearMap], matrix: Tensor, *args: Any) -> Callable[[], Case]:
    def made() -> Case:
        map_ = make(*args) if args else make(matrix.clone())
        return Case(type(map_).__name__, map_, matrix, {**FAMILIES, type(map_).__name__: type(map_)})

    return made


_W = normal(4, 4)
_UP, _DOWN = normal(4, 2), normal(2, 4, seed=1)
_D = normal(4, seed=2)
_SWAPPED = torch.tensor([0, 0, 2, 1])

# Law -> a case that it must reject.
BROKEN: dict[str, Callable[[], Case]] = {
    "apply": _case(SlightlyTooLarge, _W),
    "dense": _case(HandsOutItsWeight, _W),
    "transpose": _case(ForgetsToTranspose, _W),
    "adjoint": _case(KeepsTheOrder, torch.diag(_D) @ _W, Diagonal(_D), Dense(_W)),
    "algebra": _case(AddsTooMuch, _W),
    # An order that repeats an index is no permutation, and the claim that it is orthogonal is false.
    "claims": _case(Permutation, torch.eye(4, dtype=torch.float64)[_SWAPPED], _SWAPPED),
    "fields": _case(AlwaysEqual, _W),
    "save": _case(RoundsItsScale, 1.5 * _W, _W, 1.5),
    "moves": _case(AnswersInFloat32, _W),
    "gradient": _case(CutsTheGradient, _W),
    "hosted": _case(CopiesItsTensors, _W),
    "compiled": _case(BehavesOtherwiseWhenTraced, _W),
    "exported": _case(BehavesOtherwiseWhenTraced, _W),
    "vmapped": _case(LooksAtItsInput, _W),
    "cost": _case(HidesItsWork, _W),
    "simplified": _case(TakenForADiagonal, 2 * torch.diag(_D), _D),
    "refusals": _case(AcceptsAnyFactors, _UP @ _DOWN, _UP, _DOWN),
}
