"""What every module around a map has in common."""

from abc import abstractmethod

from torch import Tensor, nn

from eckart.maps import LinearMap


class Host(nn.Module):
    """A structured linear layer y = W x + b, W a map; subclasses say how the map's parts are held.

    Attributes:
        in_features: n.
        out_features: m.
    """

    in_features: int
    out_features: int

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape

    @abstractmethod
    def held_map(self) -> LinearMap:
        """Return the map held, made of this module's own parameters."""

    @property
    def offset(self) -> Tensor | None:
        """The bias b (m,), or None."""
        return self._parameters["bias"]  # read for every token: no `__getattr__`

    def dense(self) -> Tensor:
        """Return W as a new matrix (m, n)."""
        return self.held_map().dense()

    def extra_repr(self) -> str:
        """Show sizes and storage in the module's repr."""
        held = sum(p.numel() for p in self.parameters())
        return f"in_features={self.in_features}, out_features={self.out_features}, numbers={held:,}"
