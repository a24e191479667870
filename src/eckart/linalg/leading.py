"""The leading singular triplets of a matrix, or of a product of matrices, to a checked angle.

    A = A_1 A_2 ...,  K = A A^T (or A^T A, the smaller),  X <- p(K) X orthonormalized,  Rayleigh-Ritz in span X,  again

with p the Chebyshev polynomial that is small between 0 and the smallest Ritz value c of the block, so that one product
with K brings the k-th direction nearer by the factor exp(arccosh(2 theta_k / c - 1)). The first rounds run on K in
float32 until its rounding is all that is left. Then A acts in float64, factor by factor, and the filter in float32 only
on residuals R_j = K v_j - theta_j v_j. Those are orthogonal to the block, so that the sine of the largest angle between
the k Ritz vectors and the true ones is at most, to first order,

    f + f |R_beyond k| / (theta_k - theta_k+1),    f = (sum_j<=k |R_j|^2 / (theta_j - c)^2)^(1/2)

the first term for what the block lacks, the second for what turns inside of it. Where the rounds would cost more than
a full decomposition, since the spectrum is flat at k, or the rank is smaller than k, the latter is done.

Source: Zhou et al. 2006, "Self-consistent-field calculations using Chebyshev-filtered subspace iteration", section 3;
Davis and Kahan 1970 for the angle.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg.gram import add_upper_gram, mirror_upper
from eckart.linalg.svd import GRAM_RESOLVES, TruncatedSVD, truncated_svd

# Sine of the largest angle to the leading space, 6e-5 degrees: that of rounding an orthonormal basis to float32.
ANGLE = 1e-6
# Below this relative gap of eigenvalues of K there is no telling a space from its neighbour, and both are as good.
GAP = 1e-6
# Costs are in n^2 multiplications in float64, of which one in float32 is half. A full decomposition of K takes so many
# times n of them (measured at 512 and 1,024, one thread), and what is left to do may take this share of it and of
# forming K. Below that side the Python around it takes longer.
DENSE_COST, SHARE, MIN_SIDE = 5.5, 0.8, 256
# What float32 leaves of the angle, in units of theta_1 / (theta_k - c).
ROUNDING = 4e-7
# Growth of the first direction over the k-th in one filter: beyond, rounding to float32 drowns the k-th.
GROWTH = 1e4
TINY = 1e-300


def leading_svd(factors: Sequence[Tensor], rank: int, *, seed: int = 0) -> TruncatedSVD:
    """Return the leading singular triplets of a product of matrices.

    Args:
        factors: A_1, A_2, ..., matrices whose product is meant; one is the matrix itself.
        rank: k; at most the smaller side of the product.
        seed: seed of the random starting block.

    Returns:
        A `TruncatedSVD` in the widest dtype of the factors (float32 at least); the sine of the largest angle of its
        spaces to the true ones is at most `ANGLE`, but for rounding to that dtype and where relative gaps are below
        `GAP`. The method is "filtered", with k + 1 errors (none of several factors), or that of `truncated_svd` of the
        product in float64.

    Raises:
        EckartError: for factors that do not fit or hold NaN or Inf, or a negative rank.
    """
    largest = _checked(factors, rank)
    tall = factors[0].shape[0] > factors[-1].shape[1]
    if tall:
        factors, largest = [factor.mT for factor in reversed(factors)], largest[::-1]
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
    left, right = (found.right.mT, found.left.mT) if tall else (found.left, found.right)
    return TruncatedSVD(
        left.to(dtype).contiguous(), found.values.to(dtype), right.to(dtype).contiguous(), found.errors, found.method
    )


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


class _Product:
    """A product A of matrices (n, m); factors far from one are scaled by powers of two."""

    def __init__(self, factors: Sequence[Tensor], largest: Sequence[float]) -> None:
        self._given = factors
        self._powers = [_power(size, factor.dtype) for size, factor in zip(largest, factors, strict=True)]
        self.shape = factors[0].shape[0], factors[-1].shape[1]
        self.size = sum(factor.numel() for factor in factors)
        self.unit = math.ldexp(1.0, -sum(self._powers))

    def scaled(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the factors in a dtype."""
        wide = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self._given)
        both = zip(wide, self._powers, strict=True)
        return [(factor * math.ldexp(1.0, power) if power else factor).to(dtype) for factor, power in both]

    def gram(self) -> Tensor:
        """Return K = A A^T, (n, n) float32."""
        whole = functools.reduce(torch.matmul, self.scaled(torch.float32))
        total = whole.new_zeros(len(whole), len(whole))
        add_upper_gram(total, whole.mT)
        return mirror_upper(total)

    @functools.cached_property
    def wide(self) -> list[Tensor]:
        """The factors in float64."""
        return self.scaled(torch.float64)

    def halfway(self, rows: Tensor) -> Tensor:
        """Return rows A in float64, (b, n) to (b, m)."""
        return functools.reduce(torch.matmul, self.wide, rows)

    def times(self, rows: Tensor) -> Tensor:
        """Return rows K in float64, (b, n)."""
        return functools.reduce(torch.matmul, [factor.mT for factor in reversed(self.wide)], self.halfway(rows))

    def triplets(self, vectors: Tensor) -> TruncatedSVD:
        """Return the singular triplets of left singular vectors (k, n) in float64."""
        images = self.halfway(vectors)
        values = torch.linalg.vector_norm(images, dim=1)
        errors = values.new_zeros(0)
        if len(self.wide) == 1:
            captured = torch.cat((values.new_zeros(1), values.square().cumsum(0)))
            errors = (torch.linalg.vector_norm(self.wide[0]).square() - captured).clamp_min(0) * self.unit**2
        return TruncatedSVD(vectors.mT, values * self.unit, images / values[:, None], errors, "filtered")


def _power(largest: float, dtype: torch.dtype) -> int:
    """Return by which power of two a matrix with entries up to this is multiplied."""
    exponent, most = math.frexp(largest)[1], 1000 if dtype == torch.float64 else 120
    return 0 if abs(exponent) <= 8 else max(-most, min(most, -exponent))


@dataclass(frozen=True, slots=True)
class _Ritz:
    """Ritz vectors v of K as rows (b, n), residuals K v - theta v (b, n), and the values theta, descending float64."""

    vectors: Tensor
    residuals: Tensor
    values: Tensor

    @staticmethod
    def of(rows: Tensor, times: Callable[[Tensor], Tensor]) -> "_Ritz":
        """Return the Ritz vectors of K in the span of rows (b, n)."""
        rows = torch.linalg.qr(rows.mT).Q.mT
        images = times(rows)
        values, turn = torch.linalg.eigh((images @ rows.mT).double())
        values, turn = values.flip(0).clamp_min(0), turn.flip(1).mT.to(rows.dtype)
        vectors = turn @ rows
        return _Ritz(vectors, turn @ images - values.to(rows.dtype)[:, None] * vectors, values)

    def bounds(self, k: int) -> tuple[float, float]:
        """Return the two terms of the bound of the sine of the angle to the space of the k leading eigenvectors."""
        lengths = torch.linalg.vector_norm(self.residuals, dim=1, dtype=torch.float64)
        above = (self.values[:k] - self.values[-1]).clamp_min(TINY)
        lacking = float(torch.linalg.vector_norm(lengths[:k] / above))
        gap = max(float(self.values[k - 1] - self.values[k]), GAP * float(self.values[k - 1]))
        return lacking, lacking * float(torch.linalg.vector_norm(lengths[k:])) / max(gap, TINY)

    def filtered(self, gram: Tensor, cut: float, degree: int) -> Tensor:
        """Return T(2 K / cut - 1) of the vectors, T the Chebyshev polynomial of that degree.

        Written as T(theta) v + e, with e from the residuals alone: small, so that float32 is enough for it.
        """
        half = cut / 2
        at = (self.values / half - 1)[:, None]
        factors, factor = torch.ones_like(at), at
        residuals = (self.residuals / half).to(gram.dtype)
        before, now = torch.zeros_like(residuals), residuals
        for _ in range(degree - 1):
            image = (now @ gram) / half - now
            before, now = now, 2 * (image + factor.to(gram.dtype) * residuals) - before
            factors, factor = factor, 2 * at * factor - factors
        return factor.to(self.vectors.dtype) * self.vectors + now.to(self.vectors.dtype)


def _filtered(product: _Product, k: int, seed: int) -> TruncatedSVD | None:
    """Return the k leading triplets of a product (n, m) with n <= m; None where a full decomposition costs less."""
    (n, m), block = product.shape, _block(k)
    most = SHARE * (DENSE_COST * n + m)
    narrow = block / 2 + 8 * block**2 / n
    wide = 2 * block * product.size / n**2 + 16 * block**2 / n
    if 4 * block + 2 * (narrow + wide) > most:
        return None
    gram = product.gram()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(block, n, generator=generator).to(gram.device) @ gram
    first = _iterated(lambda rows: rows @ gram, gram, rows, k, narrow, most - 2 * wide)
    found = None if first is None else _iterated(product.times, gram, first.double(), k, wide, most)
    return None if found is None else product.triplets(found[:k])


def _iterated(
    times: Callable[[Tensor], Tensor], gram: Tensor, rows: Tensor, k: int, look: float, most: float
) -> Tensor | None:
    """Filter rows (b, n) until their k leading Ritz vectors are as near as their dtype can tell, or as is asked for.

    Args:
        times: rows (b, n) -> rows K, in the dtype of the rows.
        gram: K in float32.
        rows: (b, n).
        k: the rank.
        look: what the Ritz vectors of rows cost.
        most: what may still be worth it.

    Returns:
        The Ritz vectors (b, n), None where there is no hope of them.
    """
    wide, before, spent = rows.dtype == torch.float64, math.inf, 0.0
    while spent <= 2 * most:
        ritz = _Ritz.of(rows, times)
        top, last, cut = (float(ritz.values[i]) for i in (0, k - 1, -1))
        if last <= GRAM_RESOLVES**2 * top:
            return None
        lacking, turning = ritz.bounds(k)
        missing, goal = lacking + turning, ANGLE
        if not wide:  # of narrow gaps inside of the block it can say little
            missing, goal = lacking, max(ANGLE, ROUNDING * top / max(last - cut, ROUNDING * last))
        if missing <= goal or (not wide and 1e-3 > missing > before / 2):
            return ritz.vectors
        cut = max(cut, 1e-4 * last)
        gain = max(math.acosh(max(2 * last / cut - 1, 1.0)), 1e-9)
        steps = math.log(2 * missing / goal) / gain
        # The first look may be wrong by a factor of two.
        if len(rows) / 2 * steps + look * (1 + steps / 12) > most * (2 if before == math.inf else 1):
            return None
        # The first direction must not drown the k-th, nor may one trust an early cut far.
        growth = math.log(GROWTH) / max(math.acosh(2 * top / cut - 1) - gain, 1e-9)
        degree = max(1, math.ceil(min(steps, math.floor(growth), 3 if before == math.inf and not wide else 12)))
        rows, before, spent = ritz.filtered(gram, cut, degree), missing, spent + look + len(rows) / 2 * degree
    return None
