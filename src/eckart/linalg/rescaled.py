"""A matrix plus a low-rank one, its rows rescaled: lengths of the rows, product with inputs, and what backward needs.

    V = W + s U D,    |V_i|^2 = |W_i|^2 + 2 s (W D^T)_i . U_i + s^2 U_i (D D^T) U_i^T,    y = c * (V x) + b

On CUDA each is one kernel (`eckart.kernels`) where triton is installed; elsewhere torch's own operations.

Legend: W (m, n), U (m, r), D (r, n), c and b (m,), h = D x (t, r), y (t, m).

Source: "Scaling DoRA: High-Rank Adaptation via Factored Norms and Fused Kernels".
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.kernels import rescaled_kernels


@torch.no_grad()
def factored_row_norms(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """Return |rows of W + s U D|, (m,), float32 or wider, without the matrix."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    gram = ((up.to(wide) @ (down.to(wide) @ down.mT.to(wide))) * up).sum(1)
    kernels = rescaled_kernels(weight)
    if kernels is not None:
        squares: Tensor = kernels.squares_and_cross(weight, up, down, scale) + scale**2 * gram
        return squares.clamp_min(0).sqrt()
    cross = (F.linear(weight, down.to(weight.dtype)).to(wide) * up).sum(1)
    # torch reads W once and adds up in its own dtype or wider
    own = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    squares = own + 2 * scale * cross + scale**2 * gram
    return squares.clamp_min(0).sqrt()


def rescaled_sum(base: Tensor, hidden: Tensor, up: Tensor, ratio: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return c * (base + s h U^T) + b, written over base.

    Args:
        base: W x (t, m), contiguous.
        hidden: h (t, r), of base's dtype.
        up: U (m, r), of base's dtype.
        ratio: c (m,), float32 or wider.
        bias: b (m,), or None.
        scale: s.
    """
    kernels = rescaled_kernels(base)
    if kernels is not None:
        fused: Tensor = kernels.compose(base, hidden, up, ratio, bias, scale)
        return fused
    y = base.addmm_(hidden, up.mT, alpha=scale).mul_(ratio.to(base.dtype))
    return y if bias is None else y.add_(bias)


def rescaled_gradients(
    gradient: Tensor, y: Tensor, ratio: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return c * dy (t, m), and if asked for sum_t dy * y and sum_t dy, (m,), float32 or wider.

    Args:
        gradient: dy (t, m).
        y: (t, m).
        ratio: c (m,), float32 or wider.
        sums: whether the sums are wanted.
    """
    kernels = rescaled_kernels(gradient)
    if kernels is not None:
        found: tuple[Tensor, Tensor | None, Tensor | None] = kernels.gradients(gradient, y, ratio, sums=sums)
        return found
    inner = gradient * ratio.to(gradient.dtype)
    if not sums:
        return inner, None, None
    return inner, (gradient * y).sum(0, dtype=ratio.dtype), gradient.sum(0, dtype=ratio.dtype)
