"""Gradient rules: what stands in autograd between two factors and their use, and changes their gradients.

    forward: (B, A) -> (B, A)        backward: (g_B, g_A) -> rule(B, A, g_B, g_A)

A rule is linear in the gradients, so it commutes with their accumulation over micro-batches; it needs no optimizer of
its own, and no hook that somebody has to attach.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

# (B, A, gradient of B, gradient of A) -> what they become.
FactorRule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class _Ruled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, rule: FactorRule) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(up, down)
        ctx.rule = rule
        return up.view_as(up), down.view_as(down)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        up, down = ctx.saved_tensors
        of_up, of_down = ctx.rule(up, down, *gradients)
        return of_up, of_down, None


def factor_rule(rule: FactorRule) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the identity on two factors (m, r) and (r, n) whose gradients follow a rule.

    Args:
        rule: linear in the gradients; given detached tensors, returns tensors of their shapes and dtypes.
    """
    apply = cast(Callable[[Tensor, Tensor, FactorRule], tuple[Tensor, Tensor]], _Ruled.apply)
    return lambda up, down: apply(up, down, rule)
