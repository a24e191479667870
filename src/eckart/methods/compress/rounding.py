"""Rounding that is learned: which code every weight takes is trained, through a low-rank matrix of divisors (LRQ).

    W'_ij = s_ig clamp(round((W_ij - zero_ig) / (s_ig exp((L R)_ij + r_i + c_j)))) + zero_ig
    s_ig = start_ig exp(d_ig)

L, r, c and d start at zero, so that training starts at round to nearest; rounding is left out of the gradients.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.maps import Quantized, pack


class LearnedRounding(nn.Module):
    """A linear layer whose codes are being learned; `result` is what it has learned.

    Args:
        weight: W (m, n).
        start: codes with uniform levels and groups along rows, to start from.
        bias: (m,), not trained, or None.
        rank: of L R, at most a quarter of the shorter side is used.
        generator: draws R.
    """

    def __init__(
        self, weight: Tensor, start: Quantized, bias: Tensor | None, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        (m, n), k = weight.shape, max(1, min(rank, min(weight.shape) // 4))
        self.start = cast(Quantized, start.apply(torch.Tensor.detach))
        self.weight, self.bias = weight, bias  # neither is a parameter, nor in the state
        drawn = torch.randn(k, n, generator=generator) * math.sqrt(2 / n)  # Kaiming
        self.left, self.right = nn.Parameter(weight.new_zeros(m, k)), nn.Parameter(drawn.to(weight))
        self.row, self.column = nn.Parameter(weight.new_zeros(m, 1)), nn.Parameter(weight.new_zeros(1, n))
        self.step = nn.Parameter(torch.zeros_like(start.scale, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis: x (..., n) -> (..., m)."""
        exact, scale, zero = self._unit()
        bounded = exact.clamp(-self._half, self._half - 1)
        rounded = bounded + (bounded.round() - bounded).detach()
        return F.linear(x, rounded * scale + zero, self.bias)

    @torch.no_grad()
    def result(self, dtype: torch.dtype) -> Quantized:
        """Return the map with the codes learned, in a dtype."""
        codes = self._unit()[0].round().clamp(-self._half, self._half - 1) + self._half
        start = self.start
        zero = None if start.zero is None else start.zero.to(dtype)
        scale = (start.scale * self.step.exp()).to(dtype)
        return Quantized(pack(codes, start.bits), scale, zero, None, start.width, start.bits, start.group_size)

    @property
    def _half(self) -> int:
        return int(2 ** (self.start.bits - 1))

    def _unit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight in units of its steps, not rounded yet, and scale and zero point of every entry."""
        start, n = self.start, self.start.width
        scale = (start.scale * self.step.exp()).repeat_interleave(start.group_size, dim=1)[:, :n]
        zero = torch.zeros_like(start.scale) if start.zero is None else start.zero
        zero = zero.repeat_interleave(start.group_size, dim=1)[:, :n]
        divisor = scale * (self.left @ self.right + self.row + self.column).exp()
        return torch.where(scale == 0, 0.0, (self.weight - zero) / divisor), scale, zero
