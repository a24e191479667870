"""Trainable changes of frozen matrices, as parametrizations of a module's weight, and folding them in.

W + s B A                     a low-rank update (LoRA), B = 0 at first
W + B A + (C D) * R           with low-rank coefficients of the entries of another matrix R, C = 0 at first
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eckart.methods.compress.learner import frozen


class LowRankUpdate(nn.Module):
    """W + s B A.

    Args:
        weight: W (m, n).
        rank: at most this; never more than W has rows or columns.
        scale: s.
        generator: draws A, on the CPU.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.up, self.down = _pair(weight, rank, generator)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed W (m, n)."""
        return weight + self.scale * (self.up @ self.down)


class Graft(LowRankUpdate):
    """W + B A + (C D) * R.

    Args:
        weight: W (m, n).
        removed: R (m, n).
        rank: at most this, of both products.
        generator: draws A and D, on the CPU.
    """

    def __init__(self, weight: Tensor, removed: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__(weight, rank, 1.0, generator)
        self.removed = frozen(removed.detach())
        self.coefficients_up, self.coefficients_down = _pair(weight, rank, generator)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed W (m, n)."""
        return super().forward(weight) + (self.coefficients_up @ self.coefficients_down) * self.removed


class BiasGraft(nn.Module):
    """b + c * r, c = 0 at first.

    Args:
        removed: r (m,).
    """

    def __init__(self, removed: Tensor) -> None:
        super().__init__()
        self.removed = frozen(removed.detach())
        self.coefficients = nn.Parameter(torch.zeros_like(removed))

    def forward(self, bias: Tensor) -> Tensor:
        """Return the changed b (m,)."""
        return bias + self.coefficients * self.removed


def _pair(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """Return factors (m, k) of zeros and (k, n) as `nn.Linear` draws its weights."""
    m, n = weight.shape
    k = min(rank, m, n)
    drawn = (2 * torch.rand(k, n, generator=generator) - 1) / math.sqrt(n)
    return nn.Parameter(weight.new_zeros(m, k)), nn.Parameter(drawn.to(weight))


def changed(module: nn.Module, name: str, update: nn.Module) -> None:
    """Make a module's tensor of that name the update of what it is."""
    parametrize.register_parametrization(module, name, update)


def fold(modules: Iterable[nn.Module]) -> None:
    """Make all updates inside modules part of the tensors they change; nothing requires gradients afterwards."""
    for outer in modules:
        for module in list(outer.modules()):
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):  # type: ignore[arg-type]
                    parametrize.remove_parametrizations(module, name)
        outer.requires_grad_(False)
