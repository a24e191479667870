"""Sums of products of thin factors, recombined into one of fewer columns without their dense matrix.

    sum_i U_i V_i = U V,    U = Q_U R_U,  V^T = Q_V R_V,   U V = Q_U (R_U R_V^T) Q_V^T

so that an SVD of the small middle is an SVD of the whole: O((m + n) r^2 + r^3) in place of O(m n min(m, n)).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg.svd import TruncatedSVD


def svd_of_product(pairs: Sequence[tuple[Tensor, Tensor]], rank: int | None = None) -> TruncatedSVD:
    """Return the truncated SVD of a sum of products of thin factors.

    Args:
        pairs: U_i (m, r_i) and V_i (r_i, n), at least one; computed in float64.
        rank: triplets kept; all (at most the sum of r_i) if None.

    Raises:
        EckartError: if there are no pairs.
    """
    if not pairs:
        raise EckartError("svd_of_product needs at least one pair of factors, got none")
    up = torch.cat([u for u, _ in pairs], dim=1).double()
    down = torch.cat([v for _, v in pairs], dim=0).double()
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT)
    k = min(len(s), len(s) if rank is None else rank)
    u, vh = u[:, : len(s)], vh[: len(s)]
    errors = torch.cat((s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)))
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    factors = (left.Q @ u[:, :k]).to(dtype), s[:k].to(dtype), (vh[:k] @ right.Q.mT).to(dtype)
    return TruncatedSVD(*factors, errors, "recombined")
