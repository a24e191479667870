"""A matrix with its singular values filtered, differentiable wherever the filtered matrix is.

    F(A, m) = sum_i m_i s_i u_i v_i^T,    A = U diag(s) V^T,  G the gradient above, M = U^T G V

    dL/dm_i = s_i M_ii
    dL/dA   = U Q V^T + (I - U U^T) G V diag(m) V^T + U diag(m) U^T G (I - V V^T)
    Q_ij    = M_ij (m_i + m_j + D_ij (s_i^2 + s_j^2)) / 2 + M_ji D_ij s_i s_j,    D_ij = (m_j - m_i) / (s_j^2 - s_i^2)

Written this way the gaps between singular values appear in D alone, where equal values with equal filters cancel: with
m = 1 the gradient is G for any matrix, repeated singular values and rank-deficient ones included. Where singular values
meet and their filters differ F has no derivative; there 1 / (s_j^2 - s_i^2) is replaced by the first terms of its
series in the ratio of the two, as Dobi-SVD does, which keeps the gradient finite.

Source: Wang et al. 2025, "Dobi-SVD", section 3.2, for the series; the rest is the derivative of a spectral function.
"""

from typing import Any, cast

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg.svd import truncated_svd

# Below this relative gap of squared singular values the series takes over, with this many terms beyond the first.
GAP, TERMS = 1e-10, 10


def filtered_svd(matrix: Tensor, mask: Tensor) -> Tensor:
    """Multiply each singular value of a matrix by a number.

    Args:
        matrix: A (m, n).
        mask: (min(m, n),), for the largest singular value first.

    Returns:
        (m, n), in the dtype of the matrix; computed in float64, differentiable in both arguments.

    Raises:
        EckartError: for wrong shapes, or a matrix with NaN or Inf entries.
    """
    if matrix.ndim != 2 or tuple(mask.shape) != (min(matrix.shape),):
        raise EckartError(
            f"filtered_svd needs a matrix (m, n) and a mask (min(m, n),), got {tuple(matrix.shape)} and "
            f"{tuple(mask.shape)}"
        )
    return cast(Tensor, cast(Any, _Filtered).apply(matrix, mask))


class _Filtered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, mask: Tensor) -> Tensor:
        svd = truncated_svd(matrix.detach().double())
        ctx.save_for_backward(svd.left, svd.values, svd.right, mask)
        return ((svd.left * (svd.values * mask)) @ svd.right).to(matrix.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        left, values, right, mask = ctx.saved_tensors
        gradient, m = gradients[0].double(), mask.double()
        below, beside = left.mT @ gradient, gradient @ right.mT  # (K, n), (m, K)
        inner = below @ right.mT
        quotient = (m[None] - m[:, None]) * _inverse_gaps(values.square())
        squares = values.square()
        kept = (m[None] + m[:, None] + quotient * (squares[None] + squares[:, None])) / 2
        core = inner * kept + inner.mT * quotient * (values[None] * values[:, None])
        outside = (beside - left @ inner) * m @ right + left @ (m[:, None] * (below - inner @ right))
        whole = left @ core @ right + outside
        return whole.to(gradients[0].dtype), (values * inner.diagonal()).to(mask.dtype)


def _inverse_gaps(squares: Tensor) -> Tensor:
    """Return 1 / (s_j^2 - s_i^2) for squared singular values (K,), finite everywhere; 0 where both are 0."""
    tiny = torch.finfo(squares.dtype).tiny
    larger = torch.maximum(squares[None], squares[:, None]).clamp_min(tiny)
    ratio = torch.minimum(squares[None], squares[:, None]) / larger
    near = 1 - ratio < GAP
    series = torch.stack([ratio**k for k in range(TERMS + 1)]).sum(0)
    inverse = torch.where(near, series, 1 / (1 - ratio).clamp_min(GAP)) / larger
    order = torch.arange(squares.shape[0], device=squares.device)
    return inverse * torch.sign(order[:, None] - order[None])  # descending: s_j > s_i for j < i
