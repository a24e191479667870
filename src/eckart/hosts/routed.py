"""Changes whose low-rank part is chosen token by token.

    h = V x        K = the k largest |h + d|        y = W x + s U h_K

Not linear in x, so no matrix stands for the adapted layer. The bias d evens out how often each part is chosen:

    d_i += u sign(mean count - count_i)

It moves in backward: once for every batch that trains, however often checkpointing repeats the forward pass, which has
to choose the same parts again.

Legend: W (m, n), V (r, n) frozen, U (m, r), d (r,), x (..., n).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts.adapter import Change, Inner, add_product, applied
from eckart.hosts.host import host
from eckart.maps import LinearMap


class Routed(Change):
    """W x + s U h_K(x).

    Args:
        up: U (m, r), trained.
        down: V (r, n), frozen.
        kept: k.
        scale: s.
        balance: u.
        bias: d, zeros by default.
    """

    bias: Tensor

    def __init__(
        self, up: Tensor, down: LinearMap, kept: int, scale: float, balance: float, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), host(down).requires_grad_(False)
        self.kept, self.scale, self.balance = kept, scale, balance
        self.register_buffer("bias", torch.zeros(up.shape[1], device=up.device) if bias is None else bias)

    def of(self, inner: LinearMap) -> LinearMap:
        raise EckartError(
            "no matrix stands for an adapter that depends on its input, as this one chooses parts token by token; "
            "use it unmerged"
        )

    def call(self, x: Tensor, inner: Inner) -> Tensor:
        y, hidden = inner.call(x), applied(self.down, x)
        up: Tensor = self.up
        chosen = (hidden.detach() + self.bias).abs().topk(self.kept, dim=-1).indices
        if self.training and torch.is_grad_enabled():
            balanced = cast(Callable[..., Tensor], _Balanced.apply)
            up = balanced(up, chosen, self.bias, self.balance)
        thin = torch.zeros_like(hidden).scatter(-1, chosen, hidden.gather(-1, chosen))
        return add_product(y, thin, up.to(thin.dtype), self.scale)


class _Balanced(torch.autograd.Function):
    """The identity on U, whose backward moves the bias."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, chosen: Tensor, bias: Tensor, rate: float) -> Tensor:
        ctx.save_for_backward(chosen)  # asking for it makes checkpointing repeat the forward pass before the bias moves
        ctx.bias, ctx.rate = bias, rate
        return up.view_as(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (chosen,) = ctx.saved_tensors
        counts = torch.bincount(chosen.flatten(), minlength=ctx.bias.shape[0]).to(ctx.bias.dtype)
        with torch.no_grad():
            ctx.bias.add_((counts.mean() - counts).sign(), alpha=ctx.rate)
        return gradients[0], None, None, None
