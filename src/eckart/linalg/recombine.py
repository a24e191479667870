"""Sums of products of thin factors, recombined into one of fewer columns without their dense matrix.

    sum_i U_i V_i = U V,    U = Q_U R_U,  V^T = Q_V R_V,   U V = Q_U (R_U R_V^T) Q_V^T

so that an SVD of the small middle is an SVD of the whole: O((m + n) r^2 + r^3) in place of O(m n min(m, n)).
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    up, down = (
        (side[0] if len(pairs) == 1 else torch.cat(side, 1)).double()
        for side in zip(*((u, v.mT) for u, v in pairs), strict=True)
    )
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    accuracy = 0.0 if dtype == torch.float64 else 1e-9
    left, right = _thin_qr(up, accuracy), _thin_qr(down, accuracy)
    u, s, vh = torch.linalg.svd(left.triangle @ right.triangle.mT)
    k = min(len(s), len(s) if rank is None else rank)
    u, vh = u[:, : len(s)], vh[: len(s)]
    errors = torch.cat((s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)))
    factors = left.times(u[:, :k]).to(dtype), s[:k].to(dtype), right.times(vh[:k].mT).mT.to(dtype)
    return TruncatedSVD(*factors, errors, "recombined")


@dataclass(frozen=True, slots=True)
class _ThinQR:
    """Columns = (basis turn) triangle, basis turn being orthonormal; None for a turn by nothing."""

    basis: Tensor
    turn: Tensor | None
    triangle: Tensor

    def times(self, small: Tensor) -> Tensor:
        """Return Q times a small matrix, without Q."""
        return self.basis @ (small if self.turn is None else self.turn @ small)


def _thin_qr(columns: Tensor, accuracy: float) -> _ThinQR:
    """Decompose columns (m, r) in float64 by Cholesky factorizations, several times as fast as reflections.

    One leaves Q orthonormal to eps times the square of the condition, a second to eps; columns that are nearly
    dependent, or not many fewer than rows, take reflections.

    Args:
        columns: (m, r) float64.
        accuracy: how far from orthonormal Q may be.
    """
    if columns.shape[0] < 4 * columns.shape[1]:
        return _reflected(columns)
    first = _cholesky_round(columns)
    if first is None or torch.finfo(columns.dtype).eps * first[2] ** 2 <= accuracy:
        return _reflected(columns) if first is None else _ThinQR(columns, *first[:2])
    basis = columns @ first[0]
    second = _cholesky_round(basis)
    return _reflected(columns) if second is None else _ThinQR(basis, second[0], second[1] @ first[1])


def _cholesky_round(columns: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Return R^-1, R and R's condition, columns R^-1 being near orthonormal; None if they are too near dependent."""
    factor, failed = torch.linalg.cholesky_ex(columns.mT @ columns)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    turn = torch.linalg.solve_triangular(factor, identity, upper=False).mT
    condition = float(factor.norm() * turn.norm())
    return (turn, factor.mT, condition) if not failed and condition < 1e5 else None


def _reflected(columns: Tensor) -> _ThinQR:
    found = torch.linalg.qr(columns)
    return _ThinQR(found.Q, None, found.R)
