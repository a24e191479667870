"""Low-rank changes whose rows are rescaled, in one autograd function: the memory-exact form of DoRA.

    V = W + s U D,    c = g / |rows of V|,    y = c * (V x) + b

    |V_j|^2 = |W_j|^2 + 2 s <U_j, (W D^T)_j> + s^2 U_j (D D^T) U_j^T                    (factored norm)
    dL/dg_j = sum_t dy_tj (y_tj - b_j) / g_j                                             (from the output alone)

so that x, h = D x and y are all that backward needs: neither W x nor U h is kept, and no matrix of W's size is made.

Legend: W (m, n) frozen, U (m, r), D (r, n), g (m,), b (m,), x (t, n), h (t, r), y (t, m).

Source: "Scaling DoRA: High-Rank Adaptation via Factored Norms and Fused Kernels" for the norm; the gradient of g from
the output is derived here.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.hosts.adapter import Adapter, Plus, Rescaled
from eckart.linalg import factored_row_norms, rescaled_gradients, rescaled_sum


def factored_rescale(x: Tensor, base: nn.Module, adapter: Adapter) -> Tensor | None:
    """Return what an adapter makes of x if it is one low-rank change on a plain dense layer, rescaled; None if not."""
    match adapter.chain():
        case [Plus() as plus, Rescaled() as rescaled] if type(base) is nn.Linear:
            pass
        case _:
            return None
    factors = plus.factors()
    narrow = x.dtype != base.weight.dtype or torch.is_autocast_enabled(x.device.type)
    if factors is None or narrow or (plus.dropout is not None and plus.training):
        return None
    up, down = factors
    norms = factored_row_norms(base.weight, up, down, plus.scale)
    apply = cast(Callable[..., Tensor], _FactoredRescale.apply)
    return apply(x, base.weight, base.bias, up, down, rescaled.magnitude, norms, plus.scale)


class _FactoredRescale(torch.autograd.Function):
    """y = (g / norms) * (W x + s U D x) + b, the norms being constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        scale: float,
    ) -> Tensor:
        hidden = F.linear(x, down.to(x.dtype))
        flat, thin = F.linear(x, weight).view(-1, weight.shape[0]), hidden.view(-1, hidden.shape[-1])
        ratio = magnitude / norms.where(norms > 0, 1.0)
        y = rescaled_sum(flat, thin, up.to(x.dtype), ratio, bias, scale).view(*x.shape[:-1], weight.shape[0])
        ctx.save_for_backward(x, weight, bias, up, down, magnitude, norms, hidden, y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, up, down, magnitude, norms, hidden, y = ctx.saved_tensors
        m, r = up.shape
        gradient = gradients[0].reshape(-1, m)
        wants = ctx.needs_input_grad
        ratio, of_magnitude, of_bias = magnitude / norms.where(norms > 0, 1.0), None, None
        inner, products, total = rescaled_gradients(gradient, y.view(-1, m), ratio, sums=wants[2] or wants[5])
        if total is not None and wants[2]:
            of_bias = total.to(bias.dtype)
        if products is not None and total is not None and wants[5]:
            seen = products if bias is None else products - total * bias
            of_magnitude = (seen / magnitude.where(magnitude != 0, 1.0)).to(magnitude.dtype)
            zero = magnitude == 0
            if bool(zero.any()):  # there y says nothing of V x
                rows = zero.nonzero().flatten()
                seen = F.linear(x.view(-1, x.shape[-1]), weight[rows])
                seen += ctx.scale * F.linear(hidden.view(-1, r), up[rows].to(x.dtype))
                of_magnitude[rows] = ((gradient[:, rows] * seen).sum(0) / norms[rows].clamp_min(1e-30)).to(up.dtype)
        of_hidden = ctx.scale * (inner @ up.to(inner.dtype))
        of_up = (ctx.scale * (inner.mT @ hidden.view(-1, r))).to(up.dtype) if wants[3] else None
        of_down = (of_hidden.mT @ x.view(-1, x.shape[-1])).to(down.dtype) if wants[4] else None
        of_x = None
        if wants[0]:
            of_x = (inner @ weight).addmm_(of_hidden, down.to(inner.dtype)).view(x.shape)
        return of_x, None, of_bias, of_up, of_down, of_magnitude, None, None
