"""Some channels of many, and their way back: what narrow matrices need where the network expects wide ones."""

import torch
from torch import Tensor

from eckart.maps.base import LinearMap, linear_map, require


@linear_map
class Selection(LinearMap):
    """y_i = x_{places[i]}.

    Attributes:
        places: (k,) int32 or int64, below n, ascending.
        width: n.
    """

    places: Tensor
    width: int

    def __post_init__(self) -> None:
        _check_sizes("Selection", self.places, self.width)

    @property
    def shape(self) -> tuple[int, int]:
        return self.places.shape[0], self.width

    def __call__(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.places)

    @property
    def T(self) -> LinearMap:
        return Placement(self.places, self.width)

    def validate(self) -> None:
        """Raise an `EckartError` unless the places ascend and lie within the width."""
        _check_places("Selection", self.places, self.width)

    def flops(self, tokens: int = 1) -> int:
        return 0


@linear_map
class Placement(LinearMap):
    """y_{places[i]} = x_i, every other y_j = 0.

    Attributes:
        places: (k,) int32 or int64, below m, ascending.
        height: m.
    """

    places: Tensor
    height: int

    def __post_init__(self) -> None:
        _check_sizes("Placement", self.places, self.height)

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.places.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.height).index_copy(-1, self.places.long(), x)

    @property
    def T(self) -> LinearMap:
        return Selection(self.places, self.height)

    def validate(self) -> None:
        """Raise an `EckartError` unless the places ascend and lie within the height."""
        _check_places("Placement", self.places, self.height)

    def flops(self, tokens: int = 1) -> int:
        return 0


def _check_sizes(operation: str, places: Tensor, size: int) -> None:
    came = f"places of shape {tuple(places.shape)} and dtype {places.dtype} among {size}"
    fits = places.ndim == 1 and places.dtype in (torch.int32, torch.int64) and places.shape[0] <= size
    require(fits, operation, came, "a vector of int32 or int64, no longer than that")


def _check_places(operation: str, places: Tensor, size: int) -> None:
    ascending = bool((places.diff() > 0).all())
    inside = places.numel() == 0 or (int(places[0]) >= 0 and int(places[-1]) < size)
    require(ascending and inside, operation, "places that repeat, descend or lie outside", f"ascending, below {size}")
