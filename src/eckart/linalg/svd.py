"""Truncated singular value decompositions, with the error of every rank where it is free.

Legend: A the matrix (m, n), k the rank, sigma_i its singular values in descending order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg.eigen import top_eigen
from eckart.linalg.finite import all_finite

METHODS = ("auto", "exact", "gram", "krylov")
# Below this the exact decomposition takes milliseconds and resolves the smallest singular values best.
EXACT_MAX_SIDE = 128
# The Gram matrix mixes singular vectors of values below this share of the largest: eps / share^2 is the angle between
# their images, 2e-8 here. Those few are separated by an exact decomposition of their own.
GRAM_RESOLVES = 1e-4


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """A ~ left @ diag(values) @ right, and how far from A that is.

    Attributes:
        left: (m, k) orthonormal columns.
        values: (k,) singular values, descending.
        right: (k, n) orthonormal rows.
        errors: squared Frobenius error of rank 0, 1, ..., as far as known: all min(m, n) + 1 ranks for the "exact" and
            "gram" methods, k + 1 for "krylov"; float64.
        method: the method used: "exact", "gram", "krylov-float32" or "krylov-float64"; "filtered" of `leading_svd`.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    errors: Tensor
    method: str

    @property
    def rank(self) -> int:
        """Number of singular triplets kept."""
        return self.values.shape[0]

    def dense(self) -> Tensor:
        """Return the approximation as a matrix, (m, n)."""
        return (self.left * self.values) @ self.right


def truncated_svd(
    matrix: Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    accuracy: float = 0.0,
    method: str = "auto",
    seed: int = 0,
) -> TruncatedSVD:
    """Compute the best rank-k approximation of a matrix, or the smallest rank that meets a tolerance.

    "exact" is LAPACK's SVD in float64. "gram" eigen-decomposes the smaller of A A^T and A^T A in float64: several
    times faster and as good for errors, but singular values below 1e-12 sigma_1 are noise. "krylov" is randomized block
    Krylov iteration up to the given accuracy: fastest where the rank is a small share of a large matrix. "auto" takes
    "krylov" if an accuracy is given and the size is worth it, "exact" for small matrices, "gram" otherwise.

    Args:
        matrix: (m, n), any floating dtype; computed in float64 (float32 inside "krylov" where that is enough).
        rank: number of triplets k; None with a tolerance, or for all.
        tolerance: wanted relative Frobenius error |A - A_k| / |A|; the smallest rank that reaches it is returned.
        accuracy: allowed relative excess of the Frobenius error over the optimum of that rank; 0 asks for the optimum.
        method: "auto", "exact", "gram" or "krylov".
        seed: seed of the random starting block of "krylov".

    Returns:
        A `TruncatedSVD` in the dtype of the input (float32 at least).

    Raises:
        EckartError: for a non-matrix, NaN or Inf entries, an unknown method, or rank and tolerance together.
    """
    _check(matrix, rank, tolerance, accuracy, method)
    short = min(matrix.shape)
    if method == "auto":
        worth = accuracy > 0 and short >= 1024 and (rank is not None and rank <= 0.3 * short)
        method = "krylov" if worth else "exact" if short <= EXACT_MAX_SIDE else "gram"
    if method == "krylov":
        return _krylov(matrix, rank, tolerance, accuracy or 1e-6, seed)
    left, values, right = _full(matrix.double(), method)
    squares = values.square()
    errors = torch.cat((squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)))
    k = short if rank is None else min(rank, short)
    if tolerance is not None:
        k = _rank_for(errors, tolerance)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return TruncatedSVD(left[:, :k].to(dtype), values[:k].to(dtype), right[:k].to(dtype), errors, method)


def _check(matrix: Tensor, rank: int | None, tolerance: float | None, accuracy: float, method: str) -> None:
    if matrix.ndim != 2:
        raise EckartError(f"truncated_svd needs a matrix, got a tensor of shape {tuple(matrix.shape)}")
    if method not in METHODS:
        raise EckartError(f"unknown SVD method {method!r}; choose one of {', '.join(METHODS)}")
    if rank is not None and tolerance is not None:
        raise EckartError("give either a rank or a tolerance to truncated_svd, not both")
    if rank is not None and rank < 0:
        raise EckartError(f"rank must not be negative, got {rank}")
    if tolerance is not None and not tolerance >= 0:
        raise EckartError(f"tolerance must not be negative, got {tolerance}")
    if accuracy < 0:
        raise EckartError(f"accuracy must not be negative, got {accuracy}")
    if not matrix.is_floating_point():
        raise EckartError(f"truncated_svd needs floating numbers, got a matrix of {matrix.dtype}; convert it first")
    if not all_finite(matrix):
        raise EckartError(f"the matrix of shape {tuple(matrix.shape)} holds NaN or Inf; no decomposition exists")


def _rank_for(errors: Tensor, tolerance: float) -> int:
    return int((errors > tolerance**2 * errors[0]).sum())


def _full(matrix: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    if method == "exact" or 0 in matrix.shape:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = _full(matrix.mT, method)
        return right.mT, values, left.mT
    left = top_eigen(matrix @ matrix.mT).vectors
    image = left.mT @ matrix  # (m, n)
    values = torch.linalg.vector_norm(image, dim=1)
    clear = int((values > GRAM_RESOLVES * values.max()).sum())
    right = image[:clear] / values[:clear, None]
    if clear < values.shape[0]:
        basis = torch.linalg.qr(torch.cat((right, image[clear:])).mT)[0][:, clear:]  # (n, m - clear)
        turn, small, rows = torch.linalg.svd(image[clear:] @ basis)
        left = torch.cat((left[:, :clear], left[:, clear:] @ turn), 1)
        values, right = torch.cat((values[:clear], small)), torch.cat((right, rows @ basis.mT))
    return left, values, right


def _best_in_span(matrix: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of the matrix projected on orthonormal columns (m, k): left, values, right."""
    basis, coefficients = torch.linalg.qr(matrix.mT @ left)  # (n, k), (k, k)
    rows, values, columns = torch.linalg.svd(coefficients)
    return left @ columns.mT, values, (basis @ rows).mT


def _krylov(matrix: Tensor, rank: int | None, tolerance: float | None, accuracy: float, seed: int) -> TruncatedSVD:
    if matrix.shape[0] > matrix.shape[1]:
        other = _krylov(matrix.mT, rank, tolerance, accuracy, seed)
        return TruncatedSVD(other.right.mT, other.values, other.left.mT, other.errors, other.method)
    copies = {matrix.dtype: matrix}

    def gram(block: Tensor) -> Tensor:
        a = copies.setdefault(block.dtype, matrix.to(block.dtype))
        return a @ (a.mT @ block)

    short, energy = matrix.shape[0], float(matrix.double().square().sum())
    k = rank if rank is not None else short if tolerance is None else 32
    while True:
        # The excess of a squared error is twice that of the error itself.
        eigen = top_eigen(gram, k, size=short, trace=energy, accuracy=2 * accuracy, seed=seed, device=matrix.device)
        errors = eigen.tails()
        if tolerance is None or k >= short or float(errors[-1]) <= tolerance**2 * energy:
            break
        k = min(2 * k, short)
    if tolerance is not None:
        k = min(_rank_for(errors, tolerance), k)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    left, values, right = _best_in_span(matrix.to(dtype), eigen.vectors[:, :k].to(dtype))
    method = "gram" if eigen.method == "dense" else eigen.method
    return TruncatedSVD(left, values, right, errors, method)
