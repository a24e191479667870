"""A matrix plus low-rank ones, times inputs, in one step forward and one backward.

    y = W x + b + s_1 U_1 D_1 x + s_2 U_2 D_2 x + ...

What is low-rank stands side by side, so that what is as large as the output or the input is made once. Pairs of factors
that do not train cost no gradients and keep nothing for backward.

Legend: W (m, n) frozen, b (m,), U (m, r), D (r, n), x (t, n), h = D x (t, r), y (t, m).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


def factored_sum(
    x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Sequence[tuple[float, Tensor, Tensor]]
) -> Tensor:
    """Return W x + b + s_1 U_1 D_1 x + ...: x (..., n) -> (..., m).

    Args:
        x: inputs.
        weight: W, frozen, of the dtype of x.
        bias: b, frozen, or None.
        pairs: s, U and D each; factors of another dtype are cast, x never.
    """
    apply = cast(Callable[..., Tensor], _FactoredSum.apply)
    return apply(x, weight, bias, [pair[0] for pair in pairs], *(factor for pair in pairs for factor in pair[1:]))


class _FactoredSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Sequence[float], *factors: Tensor
    ) -> Tensor:
        up, down = _together(scales, factors, x.dtype)
        flat, y = x.reshape(-1, x.shape[-1]), x.new_empty(*x.shape[:-1], weight.shape[0])  # no view: see who adds to it
        hidden, out = F.linear(flat, down), y.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(flat, weight.mT, out=out)
        else:
            torch.addmm(bias, flat, weight.mT, out=out)
        out.addmm_(hidden, up.mT)
        trained = ctx.needs_input_grad[4::2]
        parts = hidden.split([one.shape[1] for one in factors[::2]], dim=1)
        # of several, what is kept must not hold on to the others
        kept = [part if len(parts) == 1 else part.contiguous() for part, t in zip(parts, trained, strict=True) if t]
        ctx.save_for_backward(x, weight, *factors, *kept)
        ctx.scales = scales
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        count, wants = 2 * len(ctx.scales), ctx.needs_input_grad
        factors, kept = saved[:count], iter(saved[count:])
        flat, gradient = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, weight.shape[0])
        again = torch.is_grad_enabled()  # derivatives of this derivative are wanted
        up, down = _together(ctx.scales, factors, x.dtype)
        of_hidden, of_x = gradient @ up, None
        if wants[0]:
            of_x = gradient @ weight
            of_x = of_x + of_hidden @ down if again else of_x.addmm_(of_hidden, down)
            of_x = of_x.view(x.shape)
        found: list[Tensor | None] = []
        parts = of_hidden.split([one.shape[1] for one in factors[::2]], dim=1)
        for i, (scale, part) in enumerate(zip(ctx.scales, parts, strict=True)):
            own_up, own_down = factors[2 * i : 2 * i + 2]
            of_up = of_down = None
            if wants[4 + 2 * i]:
                hidden = F.linear(flat, own_down.to(x.dtype)) if again else next(kept)
                of_up = (scale * (gradient.mT @ hidden)).to(own_up.dtype)
            if wants[5 + 2 * i]:
                of_down = (part.mT @ flat).to(own_down.dtype)
            found += [of_up, of_down]
        return of_x, None, None, None, *found


def _together(scales: Sequence[float], factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return s_1 U_1, s_2 U_2, ... as one matrix and D_1, D_2, ... as one."""
    ups = [(up if scale == 1.0 else scale * up).to(dtype) for scale, up in zip(scales, factors[::2], strict=True)]
    downs = [down.to(dtype) for down in factors[1::2]]
    return (ups[0], downs[0]) if len(ups) == 1 else (torch.cat(ups, dim=1), torch.cat(downs))
