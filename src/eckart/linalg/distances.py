"""Euclidean distances between two sets of few numbers each, from products of matrices in both directions.

    d_ij = |x_i - y_j|        dL/dx_i = x_i sum_j q_ij - sum_j q_ij y_j,    q = dL/dd / d,  0 where d is 0

torch's own derivative goes pair by pair and takes many times as long.

Legend: x (m, h), y (n, h), d and q (m, n), each with leading axes of their own.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j| for all pairs: x (..., m, h) and y (..., n, h) -> (..., m, n)."""
    apply = cast(Callable[..., Tensor], _Distances.apply)
    return apply(x, y)


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        out = _distances(x, y)
        ctx.save_for_backward(x, y, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, out = ctx.saved_tensors
        least = out.new_tensor(torch.finfo(out.dtype).tiny)  # q is 0 where d is
        shares = torch.addcmul(least, out, out)
        if torch.is_grad_enabled():  # derivatives of this derivative are wanted
            shares = gradients[0] * (out / shares)
        else:
            torch.div(out, shares, out=shares).mul_(gradients[0])
        wants = ctx.needs_input_grad
        of_x = x * shares.sum(-1, keepdim=True) - shares @ y if wants[0] else None
        of_y = y * shares.sum(-2)[..., None] - shares.mT @ x if wants[1] else None
        return of_x, of_y


def _distances(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    # |x|^2 + |y|^2 - 2 x.y loses half of the digits: in float64 enough are left
    x, y, dtype = x.double(), y.double(), x.dtype
    rows = torch.cat((-2 * x, x.square().sum(-1, keepdim=True), x.new_ones(*x.shape[:-1], 1)), dim=-1)
    columns = torch.cat((y, y.new_ones(*y.shape[:-1], 1), y.square().sum(-1, keepdim=True)), dim=-1)
    squares: Tensor = (rows @ columns.mT).to(torch.promote_types(dtype, torch.float32))
    return squares.clamp_min_(0).sqrt_().to(dtype)
