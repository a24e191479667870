"""The leading singular triplets of a product of matrices that is never formed, and of one matrix, to a checked angle.

    A = A_1 A_2 ...,  K = A A^T (or A^T A, the smaller),  X <- p(K) X orthonormalized,  Rayleigh-Ritz in span X,  again

with p the Chebyshev polynomial that is small between 0 and the smallest Ritz value c of the block, so that one product
with K brings the k-th direction nearer by the factor exp(arccosh(2 theta_k / c - 1)). The first rounds run in float32
until its rounding is all that is left, the last ones in float64. With R_j = K v_j - theta_j v_j, which is orthogonal to
the block, the sine of the largest angle between the k Ritz vectors and the true ones is at most, to first order,

    f + f |R_beyond k| / (theta_k - theta_k+1),    f = (sum_j<=k |R_j|^2 / (theta_j - c)^2)^(1/2)

the first term for what the block lacks, the second for what turns inside of it. Where the rounds would cost more than
a full decomposition, since the spectrum is flat at k, or the rank is smaller than k, the latter is done.

Source: Zhou et al. 2006, "Self-consistent-field calculations using Chebyshev-filtered subspace iteration", section 3;
Davis and Kahan 1970 for the angle.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg.svd import GRAM_RESOLVES, TruncatedSVD, truncated_svd

# Sine of the largest angle to the leading space, 6e-5 degrees: that of rounding an orthonormal basis to float32.
ANGLE = 1e-6
# Below this relative gap of eigenvalues of K there is no telling a space from its neighbour, and both are as good.
GAP = 1e-6
# Costs are in products of the block with K in float64, of which one in float32 is half. A full decomposition of K takes
# so many times n^3 multiplications (measured at 512 and 1,024, one thread), and what is left of the rounds may take this
# share of it and of forming K. All take this much at least; below that side their Python takes longer than it.
DENSE_COST, SHARE, LEAST, MIN_SIDE = 5.5, 0.8, 11, 256
# What float32 leaves of the angle, in units of theta_1 / (theta_k - c).
ROUNDING = 4e-7
# Growth of the first direction over the k-th in one filter: beyond, rounding drowns the k-th.
GROWTH = {torch.float32: 1e4, torch.float64: 1e10}


def leading_svd(factors: Sequence[Tensor], rank: int, *, seed: int = 0) -> TruncatedSVD:
    """Return the leading singular triplets of a product of matrices.

    Args:
        factors: A_1, A_2, ..., matrices whose product is meant; one is the matrix itself.
        rank: k; at most the smaller side of the product.
        seed: seed of the random starting block.

    Returns:
        A `TruncatedSVD` in the widest dtype of the factors (float32 at least); the sine of the largest angle of its
        spaces to the true ones is at most `ANGLE`, but for rounding to that dtype and where relative gaps are below
        `GAP`. The method is "filtered", with k + 1 errors, or that of `truncated_svd` of the product in float64.

    Raises:
        EckartError: for factors that do not fit or hold NaN or Inf, or a negative rank.
    """
    largest = _checked(factors, rank)
    if factors[0].shape[0] > factors[-1].shape[1]:
        other = leading_svd([factor.mT for factor in reversed(factors)], rank, seed=seed)
        return TruncatedSVD(other.right.mT, other.values, other.left.mT, other.errors, other.method)
    dtype = torch.float32
    for factor in factors:
        dtype = torch.promote_types(dtype, factor.dtype)
    n = factors[0].shape[0]
    found = None
    if n >= MIN_SIDE and rank > 0 and 2 * _block(rank) <= n:
        found = _filtered(_Product(factors, largest), rank, seed)
    if found is None:
        product = factors[0].double()
        for factor in factors[1:]:
            product = product @ factor.double()
        found = truncated_svd(product, rank)
    return TruncatedSVD(found.left.to(dtype), found.values.to(dtype), found.right.to(dtype), found.errors, found.method)


def _checked(factors: Sequence[Tensor], rank: int) -> list[float]:
    """Return the size of the largest entry of every factor."""
    if not factors or any(factor.ndim != 2 for factor in factors):
        raise EckartError(f"leading_svd needs matrices, got tensors of shape {[tuple(f.shape) for f in factors]}")
    if any(one.shape[1] != two.shape[0] for one, two in itertools.pairwise(factors)):
        raise EckartError(f"leading_svd needs factors that multiply, got {[tuple(f.shape) for f in factors]}")
    if rank < 0:
        raise EckartError(f"rank must not be negative, got {rank}")
    if not all(factor.is_floating_point() for factor in factors):
        raise EckartError(f"leading_svd needs floating numbers, got {[factor.dtype for factor in factors]}")
    largest = [max(-float(f.min()), float(f.max())) if f.numel() else 0.0 for f in factors]
    if not all(math.isfinite(size) for size in largest):
        raise EckartError("leading_svd needs finite numbers, and a factor holds NaN or Inf")
    return largest


def _block(rank: int) -> int:
    """Twice the rank: half of it or once more cost as much on spectra like i^-1/2 and i^-1."""
    return max(2 * rank, rank + 16)


@dataclass(frozen=True, slots=True)
class _Ritz:
    """Ritz vectors of K as rows (b, n), their images by A^T (b, m) and K (b, n), and their values, descending float64."""

    vectors: Tensor
    halfway: Tensor
    images: Tensor
    values: Tensor

    def bounds(self, k: int) -> tuple[float, float]:
        """Return the two terms of the bound of the sine of the angle to the space of the k leading eigenvectors."""
        rest = self.images - self.values.to(self.images.dtype)[:, None] * self.vectors
        residuals = torch.linalg.vector_norm(rest, dim=1).double()
        above = (self.values[:k] - self.values[-1]).clamp_min(torch.finfo(torch.float64).tiny)
        lacking = float(torch.linalg.vector_norm(residuals[:k] / above))
        gap = max(float(self.values[k - 1] - self.values[k]), GAP * float(self.values[k - 1]))
        return lacking, lacking * float(torch.linalg.vector_norm(residuals[k:])) / max(gap, 1e-300)

    def filtered(self, operator: "_Product", cut: float, degree: int) -> Tensor:
        """Return p(K) of the vectors at length 1, p of that degree and small between 0 and the cut."""
        half = cut / 2
        before, now = self.vectors, (self.images - half * self.vectors) / half
        for _ in range(degree - 1):
            image = operator.forward(operator.backward(now))
            before, now = now, 2 * (image - half * now) / half - before
        return torch.nn.functional.normalize(now, dim=1)


class _Product:
    """A product of matrices, applied to rows; factors far from one are scaled by powers of two."""

    def __init__(self, factors: Sequence[Tensor], largest: Sequence[float]) -> None:
        self._given = factors
        self._powers = [_power(size, factor.dtype) for size, factor in zip(largest, factors, strict=True)]
        self.shape = factors[0].shape[0], factors[-1].shape[1]
        self.device = factors[0].device
        self.unit = math.ldexp(1.0, -sum(self._powers))
        self.size = sum(factor.numel() for factor in factors)
        self.use(torch.float32)

    def use(self, dtype: torch.dtype) -> None:
        """Work in this dtype from now on."""
        self.factors = []
        for factor, power in zip(self._given, self._powers, strict=True):
            wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
            self.factors.append((wide * math.ldexp(1.0, power) if power else wide).to(dtype))

    def backward(self, rows: Tensor) -> Tensor:
        """Return rows A, (b, n) to (b, m)."""
        for factor in self.factors:
            rows = rows @ factor
        return rows

    def forward(self, rows: Tensor) -> Tensor:
        """Return rows A^T, (b, m) to (b, n)."""
        for factor in reversed(self.factors):
            rows = rows @ factor.mT
        return rows

    def ritz(self, rows: Tensor) -> _Ritz:
        """Return the Ritz vectors of K in the span of rows (b, n)."""
        rows = torch.linalg.qr(rows.mT).Q.mT
        halfway = self.backward(rows)
        values, turn = torch.linalg.eigh((halfway @ halfway.mT).double())
        turn = turn.flip(1).mT.to(rows.dtype)
        halfway = turn @ halfway
        return _Ritz(turn @ rows, halfway, self.forward(halfway), values.flip(0).clamp_min(0))


def _power(largest: float, dtype: torch.dtype) -> int:
    """Return by which power of two a matrix with entries up to this is multiplied."""
    exponent, most = math.frexp(largest)[1], 1000 if dtype == torch.float64 else 120
    return 0 if abs(exponent) <= 16 else max(-most, min(most, -exponent))


def _filtered(operator: _Product, k: int, seed: int) -> TruncatedSVD | None:
    """Return the k leading triplets of a product (n, m) with n <= m; None where a full decomposition costs less."""
    (n, m), block = operator.shape, _block(k)
    most = SHARE * n * (DENSE_COST * n * n + n * m) / (2 * block * operator.size)
    if most < LEAST:
        return None
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(block, n, generator=generator).to(operator.device)
    rows = operator.forward(operator.backward(rows))
    ritz = _iterated(operator, rows, k, most)
    if ritz is not None:
        operator.use(torch.float64)
        ritz = _iterated(operator, ritz.vectors.double(), k, most)
    return None if ritz is None else _triplets(operator, ritz, k)


def _iterated(operator: _Product, rows: Tensor, k: int, most: float) -> _Ritz | None:
    """Filter rows (b, n) until their k leading Ritz vectors are as near as their dtype can tell, or as is asked for.

    Args:
        operator: the product, in the dtype of the rows.
        rows: (b, n).
        k: the rank.
        most: what may still be worth it, in products with K in float64.

    Returns:
        The Ritz vectors, None where there is no hope of them.
    """
    wide, before, spent = rows.dtype == torch.float64, math.inf, 0.0
    cost = 1.0 if wide else 0.5
    turned = cost * (1 + 8 * rows.numel() / operator.size)  # with the orthonormalization
    while spent <= 2 * most:
        ritz, spent = operator.ritz(rows), spent + turned
        top, last, cut = (float(ritz.values[i]) for i in (0, k - 1, -1))
        if last <= GRAM_RESOLVES**2 * top:
            return None
        lacking, turning = ritz.bounds(k)
        missing, goal = lacking + turning, ANGLE
        if not wide:  # of narrow gaps inside of the block it can say little
            missing, goal = lacking, max(ANGLE, ROUNDING * top / max(last - cut, ROUNDING * last))
        if missing <= goal or (not wide and 1e-3 > missing > before / 2):
            return ritz
        cut = max(cut, 1e-4 * last)
        gain = max(math.acosh(max(2 * last / cut - 1, 1.0)), 1e-9)
        steps, later = math.log(2 * missing / goal) / gain, 0.0 if wide else math.log(goal / ANGLE) / gain
        # The first look may be wrong by a factor of two.
        if cost * steps + later + turned > most * (2 if before == math.inf else 1):
            return None
        # The first direction must not drown the k-th, nor may one trust an early cut far.
        growth = math.log(GROWTH[rows.dtype]) / max(math.acosh(2 * top / cut - 1) - gain, 1e-9)
        degree = max(1, math.ceil(min(steps, math.floor(growth), 3 if before == math.inf and not wide else 12)))
        rows, before, spent = ritz.filtered(operator, cut, degree), missing, spent + cost * (degree - 1)
    return None


def _triplets(operator: _Product, ritz: _Ritz, k: int) -> TruncatedSVD:
    """Return the singular triplets of Ritz vectors in float64."""
    values = torch.linalg.vector_norm(ritz.halfway[:k], dim=1)
    errors = values.new_zeros(0)
    if len(operator.factors) == 1:
        whole = operator.factors[0].flatten()
        energy = torch.dot(whole, whole)
        errors = (energy - torch.cat((values.new_zeros(1), values.square().cumsum(0)))).clamp_min(0) * operator.unit**2
    return TruncatedSVD(
        ritz.vectors[:k].mT, values * operator.unit, ritz.halfway[:k] / values[:, None], errors, "filtered"
    )
