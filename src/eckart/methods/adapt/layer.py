"""What a page sees of one layer: its weight and the decompositions and statistics that data-driven starts share."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts import Adapter, is_convolution, kernel_axes, map_of
from eckart.linalg import TruncatedSVD, leading_svd
from eckart.stats import Moments


@dataclass(slots=True)
class Layer:
    """One linear layer about to be adapted.

    Attributes:
        name: its name in the model.
        module: the frozen layer.
        seed: the run's seed.
        rank: rank given by a redistribution over layers, or None for what the settings say.
        inputs: moments of its inputs, if the recipe asks for them.
        derived: what was derived from those moments, one dictionary for all layers that share them.
        gradient: mean gradient of the loss by its weight (m, n), if the recipe asks for it.
        earlier: the adapter that the new one builds on, or None.
    """

    name: str
    module: nn.Module
    seed: int
    rank: int | None = None
    inputs: Moments | None = None
    gradient: Tensor | None = None
    derived: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    earlier: Adapter | None = None
    _svd: dict[int, TruncatedSVD] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return map_of(self.module).shape

    @property
    def axes(self) -> tuple[int, ...]:
        """The sizes of the weight's axes: (out, in), or (out, c, k_1, ...) of a convolution."""
        return (self.shape[0], *kernel_axes(self.module)) if is_convolution(self.module) else self.shape

    def weight(self) -> Tensor:
        """Return W (m, n), float32 or wider, detached."""
        dense = map_of(self.module).dense().detach()
        return dense.to(torch.promote_types(dense.dtype, torch.float32))

    def svd(self, rank: int) -> TruncatedSVD:
        """Return the leading singular triplets of W."""
        if rank not in self._svd:
            self._svd[rank] = leading_svd([self.weight()], rank, seed=self.seed)
        return self._svd[rank]

    def input_moments(self) -> Moments:
        """Return the moments of the layer's inputs.

        Raises:
            EckartError: if there is no data.
        """
        if self.inputs is None:
            raise EckartError(f"this method starts from what {self.name} sees; give data= a few batches of real inputs")
        return self.inputs

    def weight_gradient(self) -> Tensor:
        """Return the mean gradient of the loss by W, (m, n).

        Raises:
            EckartError: if there is no data.
        """
        if self.gradient is None:
            raise EckartError(f"this method starts from gradients at {self.name}; give data= a few labelled batches")
        return self.gradient

    def of_inputs(self, key: str, find: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what is derived from the inputs' moments, found once for all layers that share them."""
        if key not in self.derived:
            self.derived[key] = find()
        return self.derived[key]

    def generator(self, *, module: bool = False) -> torch.Generator:
        """Return what is random in this layer: the same for the same seed and name, whatever other layers there are.

        Args:
            module: whether it is the same for all layers of the module that holds this one.
        """
        name = self.name.rpartition(".")[0] if module else self.name
        return torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(name.encode()))

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, float32, on the layer's device."""
        return torch.randn(*shape, generator=self.generator()).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers uniform in [-1, 1), float32, on the layer's device."""
        return (2 * torch.rand(*shape, generator=self.generator()) - 1).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return next(self.module.parameters()).device

    def fitting(self, rank: int) -> int:
        """Return the rank to use: the redistributed one, or what was asked for.

        Raises:
            EckartError: if the layer is narrower.
        """
        chosen = rank if self.rank is None else self.rank
        if chosen > min(self.shape):
            m, n = self.shape
            raise EckartError(f"rank {chosen} is more than {self.name} ({m} x {n}) can have; use at most {min(m, n)}")
        return chosen
