"""Pivot rows: a well-conditioned subset of the rows of a tall matrix that the other rows interpolate.

Legend: U the matrix (m, k) of full column rank, P its k pivot rows, R the other m - k rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pivots:
    """Rows of a matrix U (m, k) split so that U[rest] = coefficients @ U[rows].

    Attributes:
        rows: (k,) int64, the pivot rows.
        rest: (m - k,) int64, the others, ascending.
        coefficients: (m - k, k), entries bounded by `growth` in magnitude.
    """

    rows: Tensor
    rest: Tensor
    coefficients: Tensor


def pivot_rows(matrix: Tensor, growth: float = 1.05, max_swaps: int = 1000) -> Pivots:
    """Choose k rows of near-maximal volume, so that no interpolation coefficient exceeds `growth`.

    Starts from the rows that Gaussian elimination with partial pivoting takes, then swaps a pivot with any row whose
    coefficient is larger than `growth`; each swap multiplies the volume by that coefficient, so it ends.

    Args:
        matrix: (m, k), m >= k, of full column rank; computed in float64.
        growth: largest coefficient tolerated, above 1.
        max_swaps: bound on the number of swaps.

    Returns:
        `Pivots`, coefficients in float64.

    Source: Goreinov et al. 2010, "How to find a good submatrix" (maxvol).
    """
    m, k = matrix.shape
    u = matrix.double()
    if k == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=u.device)
        return Pivots(empty, torch.arange(m, device=u.device), u.new_zeros(m, 0))
    order = _elimination_order(u)
    # Every row in terms of the pivots: all (m, k), with unit rows at the pivots.
    coefficients = torch.linalg.solve(u[order[:k]], u, left=False)
    rows = order[:k].clone()
    for _ in range(max_swaps):
        largest = int(coefficients.abs().argmax())
        i, j = divmod(largest, k)
        if float(coefficients[i, j].abs()) <= growth:
            break
        # Row i replaces pivot j: a rank-one update keeps all rows expressed in the new pivots.
        change = coefficients[i].clone()
        change[j] -= 1.0
        coefficients -= torch.outer(coefficients[:, j] / coefficients[i, j], change)
        rows[j] = i
    rows = rows.sort().values
    mask = torch.ones(m, dtype=torch.bool, device=u.device)
    mask[rows] = False
    rest = mask.nonzero().flatten()
    # Solved once more from the final pivots: the updates above gather rounding errors.
    return Pivots(rows, rest, torch.linalg.solve(u[rows], u[rest], left=False))


def _elimination_order(matrix: Tensor) -> Tensor:
    """Return the row permutation of LU with partial pivoting, (m,) int64."""
    # Without the check for singularity: the solve that follows says it in terms of the pivots.
    _, swaps, _ = torch.linalg.lu_factor_ex(matrix)
    order = torch.arange(matrix.shape[0]).tolist()
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order, device=matrix.device)
