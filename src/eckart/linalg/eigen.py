"""Symmetric positive semi-definite eigenproblems: shrinkage, roots, and the leading eigenvectors.

Legend: K a PSD matrix (n, n), k the rank asked for, b the block size, D = b * steps the Krylov dimension.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from eckart.errors import EckartError

# A PSD operator: maps a block of columns (n, b) to K @ block, in the dtype of the block.
Operator = Callable[[Tensor], Tensor]

# Below this size a dense eigen-decomposition costs less than the Python around a Krylov iteration.
KRYLOV_MIN_SIZE = 1024
# Above this share of the spectrum the Krylov basis is as large as the matrix, and dense wins.
KRYLOV_MAX_SHARE = 0.3
# A basis beyond this share of n costs more than the dense decomposition.
KRYLOV_MAX_BASIS = 0.75


@dataclass(frozen=True, slots=True)
class TopEigen:
    """The leading eigenpairs of a PSD matrix and what is left of its trace.

    Attributes:
        values: (k,) float64, descending, clamped at zero.
        vectors: (n, k) orthonormal columns, in the working dtype.
        trace: sum of all n eigenvalues; exact for "dense", otherwise as given or estimated.
        method: "dense", "krylov-float32" or "krylov-float64".
        excess: estimated relative excess of the tail `trace - sum(values)` over the optimal one; 0.0 for "dense".
    """

    values: Tensor
    vectors: Tensor
    trace: float
    method: str
    excess: float

    def tails(self) -> Tensor:
        """Return what each rank leaves behind: (k + 1,) float64, entry r is the trace minus the r largest values."""
        captured = torch.cat((self.values.new_zeros(1), self.values.cumsum(0)))
        return (self.trace - captured).clamp_min(0.0)


def shrink(moment: Tensor, amount: float) -> Tensor:
    """Pull a second moment towards the isotropic one of equal trace: (1 - a) M + a mean(diag M) I.

    Args:
        moment: (n, n), or (n,) for a diagonal moment.
        amount: a in [0, 1].

    Returns:
        A new tensor of the same shape and dtype (the input itself if the amount is zero).
    """
    if not 0.0 <= amount <= 1.0:
        raise EckartError(f"shrinkage must lie in [0, 1], got {amount}")
    if amount == 0.0 or moment.shape[0] == 0:
        return moment
    if moment.ndim == 1:
        return (1 - amount) * moment + amount * moment.mean()
    out = (1 - amount) * moment
    out.diagonal().add_(amount * moment.diagonal().mean())
    return out


def psd_roots(moment: Tensor, floor: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a PSD moment and that root's inverse, in float64.

    Eigenvalues below `floor` times the largest are raised to it, so both results are finite for singular moments.
    A zero moment is replaced by the identity: no direction is preferred over another.

    Args:
        moment: (n, n), or (n,) for a diagonal moment.
        floor: relative eigenvalue floor.
    """
    if moment.ndim == 1:
        largest = moment.max().clamp_min(0) if moment.numel() else moment.new_zeros(())
        values = moment.double().clamp_min(float(largest) * floor) if largest > 0 else torch.ones_like(moment.double())
        return values.sqrt(), values.rsqrt()
    values, vectors = torch.linalg.eigh(moment.double())
    largest = values[-1].clamp_min(0) if values.numel() else values.new_zeros(())
    values = values.clamp_min(float(largest) * floor) if largest > 0 else torch.ones_like(values)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


def regular_cholesky(moment: Tensor, floor: float) -> Tensor | None:
    """Return the lower Cholesky factor of a PSD moment if it is certainly regular, else None, in float64.

    Regular means that the smallest eigenvalue exceeds `floor` times the largest. Sufficient for that, and a tenth of an
    eigen-decomposition's work: 1 / tr(M^-1) > floor tr(M), since the traces bound the eigenvalues.

    Args:
        moment: (n, n).
        floor: relative eigenvalue floor.
    """
    factor, failed = torch.linalg.cholesky_ex(moment.double())
    if failed:
        return None
    inverse = float(torch.cholesky_inverse(factor).diagonal().sum())
    return factor if 0 < inverse * floor * float(moment.diagonal().sum()) < 1 else None


def top_eigen(
    matrix: Tensor | Operator,
    rank: int | None = None,
    *,
    size: int | None = None,
    trace: float | None = None,
    accuracy: float = 0.0,
    seed: int = 0,
    device: torch.device | None = None,
) -> TopEigen:
    """Find the `rank` leading eigenpairs of a PSD matrix, choosing the method from size, rank and accuracy.

    With `accuracy` zero, a small matrix or a large share of the spectrum, the full decomposition is computed in
    float64 ("dense"), and its error curve covers every rank. Otherwise randomized block Krylov iteration with full
    orthogonalization runs until its own estimate of the relative excess of the tail is below `accuracy`; it works in
    float32 where float32 rounding is below that target and in float64 where it is not.

    Args:
        matrix: PSD matrix (n, n), or a function applying it to a block of columns (n, b).
        rank: number of eigenpairs; None for all.
        size: n, needed if `matrix` is a function.
        trace: sum of all eigenvalues if known; otherwise estimated from probes of the complement.
        accuracy: allowed relative excess of `trace - sum(values)` over the optimum.
        seed: seed of the random starting block.
        device: where a function works (that of the matrix otherwise).

    Raises:
        EckartError: if the rank is negative or the size of a function is missing.

    Source: Musco and Musco 2015, "Randomized block Krylov methods", Algorithm 2, with Rayleigh-Ritz on the projected
    matrix; trace of the complement as in Meyer et al. 2021, "Hutch++".
    """
    if isinstance(matrix, Tensor):
        dense, n, device = matrix, matrix.shape[0], matrix.device
        operator: Operator = lambda block: dense.to(block.dtype) @ block  # noqa: E731
        trace = float(dense.diagonal().double().sum()) if trace is None else trace
    else:
        if size is None:
            raise EckartError("top_eigen needs the size of an operator given as a function")
        operator, n, device = matrix, size, device or torch.device("cpu")
    if rank is not None and rank < 0:
        raise EckartError(f"rank must not be negative, got {rank}")
    k = n if rank is None else min(rank, n)
    if accuracy <= 0.0 or n < KRYLOV_MIN_SIZE or k > KRYLOV_MAX_SHARE * n or k == 0:
        return _dense(matrix, operator, n, k, device)
    for dtype in (torch.float32, torch.float64):
        found = _krylov(operator, n, k, trace, accuracy, seed, dtype, device)
        if found is None:
            break
        if dtype == torch.float64 or _rounding(found.values, dtype) <= accuracy * float(found.tails()[-1]):
            return found
    return _dense(matrix, operator, n, k, device)


def _rounding(values: Tensor, dtype: torch.dtype) -> float:
    """Return the energy that rounding can hide: sqrt(k) eps theta_1, which measured excesses follow closely."""
    return math.sqrt(values.shape[0]) * torch.finfo(dtype).eps * float(values[0])


def _dense(matrix: Tensor | Operator, operator: Operator, n: int, k: int, device: torch.device) -> TopEigen:
    full = matrix if isinstance(matrix, Tensor) else operator(torch.eye(n, dtype=torch.float64, device=device))
    full = full.double()
    values, vectors = torch.linalg.eigh((full + full.mT) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return TopEigen(values[:k], vectors[:, :k], float(values.sum()), "dense", 0.0)


def _orthonormalize(rows: Tensor) -> Tensor:
    """Orthonormalize rows by two Cholesky factorizations, or by QR where they are nearly dependent."""
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex((rows @ rows.mT).double())
        if failed or float(factor.diagonal().min()) < 1e-6 * float(factor.diagonal().max()):
            return cast(Tensor, torch.linalg.qr(rows.mT)[0]).mT.contiguous()
        # Multiplying by the inverse of the small factor copies nothing; a triangular solve would transpose the rows
        # twice. The second round removes the rounding of the first.
        identity = torch.eye(rows.shape[0], dtype=factor.dtype, device=factor.device)
        rows = torch.linalg.solve_triangular(factor, identity, upper=False).to(rows.dtype) @ rows
    return rows


def _krylov(
    operator: Operator,
    n: int,
    k: int,
    trace: float | None,
    accuracy: float,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> TopEigen | None:
    """Run block Krylov until the estimated excess is below `accuracy`; None if the basis would outgrow dense."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, _block_size(k), generator=generator, dtype=dtype).to(device)
    space = _KrylovSpace(operator, start)
    space.expand_to(k)
    early = space.size, _captured(space.projected(), k)
    # About twice the rank serves an excess of 1e-3 where eigenvalues fall like 1/i (benchmarks/solver.py).
    target = k + max(3 * space.block, round(k * (0.48 + 0.2 * max(0.0, -math.log10(accuracy)))))
    while True:
        space.expand_to(target)
        projected = space.projected()
        values, small = torch.linalg.eigh(projected.mT)  # symmetric, and in LAPACK's own order this way
        values, small = values[-k:].flip(0).double().clamp_min(0), small[:, -k:].flip(1)
        if trace is None:
            trace = float(projected.diagonal().double().sum()) + _complement_trace(operator, space.basis(), generator)
        tail = max(trace - float(values.sum()), 0.0)
        if tail == 0.0:
            excess, ratio = 0.0, 0.5
        else:
            unseen = max(trace - float(projected.diagonal().double().sum()), 0.0) / max(n - space.size, 1)
            remaining, ratio = _remaining_gain(values, space.residuals(small), unseen, early, space)
            excess = remaining / tail
        if excess <= accuracy:
            name = f"krylov-{str(dtype).removeprefix('torch.')}"
            return TopEigen(values, space.basis().mT @ small, trace, name, excess)
        steps = math.ceil(math.log(accuracy / excess) / math.log(ratio))
        target = space.size + space.block * max(1, min(steps, space.size // (4 * space.block)))
        if target > KRYLOV_MAX_BASIS * n:
            return None


def _captured(projected: Tensor, k: int) -> float:
    """Return the sum of the k largest eigenvalues; the trace where hardly any are left out, and small ones at that."""
    values = projected.diagonal() if projected.shape[0] - k <= k // 16 else torch.linalg.eigvalsh(projected.mT)[-k:]
    return float(values.clamp_min(0).double().sum())


def _block_size(rank: int) -> int:
    """Small blocks converge in a smaller basis, large ones multiply faster; a tenth of the rank was best of all."""
    return max(32, min(128, 32 * round(rank / 320)))


class _KrylovSpace:
    """An orthonormal basis of span(X, K X, K^2 X, ...) and the matrix K projected on it, grown block by block."""

    def __init__(self, operator: Operator, start: Tensor) -> None:
        self.operator, self.block, self.size = operator, start.shape[1], 0
        self._rows = start.new_empty(0, start.shape[0])  # rows are basis vectors, with room to grow
        self._columns: list[Tensor] = []  # column j: V^T K V_j for the blocks up to j
        self._next = _orthonormalize(start.mT.contiguous())
        self._coupling = start.new_zeros(self.block, self.block)

    def basis(self) -> Tensor:
        """Return the basis vectors as rows, (size, n)."""
        return self._rows[: self.size]

    def projected(self) -> Tensor:
        """Return V^T K V, (size, size), symmetric."""
        out = self._rows.new_empty(self.size, self.size)
        for j, column in enumerate(self._columns):
            at, end = j * self.block, column.shape[0]
            out[:end, at:end] = column
            out[at:end, :at] = column[:at].mT
            out[at:end, at:end] = (column[at:] + column[at:].mT) / 2
        return out

    def residuals(self, ritz: Tensor) -> Tensor:
        """Return |K u - theta u|^2 of the Ritz vectors whose coordinates are the columns of `ritz`, (k,) float64."""
        return (self._coupling @ ritz[-self.block :]).double().square().sum(0)

    def expand_to(self, size: int) -> None:
        """Grow the basis to at least `size` vectors."""
        if size > self._rows.shape[0]:
            grown = self._next.new_empty(math.ceil(size / self.block) * self.block, self._next.shape[1])
            grown[: self.size] = self.basis()
            self._rows = grown
        while self.size < size:
            self._rows[self.size : self.size + self.block] = self._next
            self.size += self.block
            basis, recent = self.basis(), self._rows[max(0, self.size - 2 * self.block) : self.size]
            image = self.operator(self._next.mT).mT  # (b, n)
            # In exact arithmetic only the two latest blocks have components; removing those first leaves so little
            # that one pass over the whole basis keeps it orthogonal to working precision.
            leading = recent @ image.mT  # (2b, b)
            image = torch.addmm(image, leading.mT, recent, alpha=-1)
            column = basis @ image.mT  # (size, b)
            image = torch.addmm(image, column.mT, basis, alpha=-1)
            column[self.size - recent.shape[0] :] += leading
            self._columns.append(column)
            self._next = self._orthogonal(image)
            self._coupling = self._next @ image.mT

    def _orthogonal(self, image: Tensor) -> Tensor:
        """Orthonormalize the rows of `image`, and repeat while they are not orthogonal to the basis as well."""
        basis, probe = self.basis(), torch.ones(image.shape[0], 1, dtype=image.dtype, device=image.device)
        probe[::2] = -1
        limit = 1e3 * torch.finfo(image.dtype).eps
        following = _orthonormalize(image)
        for _ in range(3):
            if float((basis @ (following.mT @ probe)).abs().max()) <= limit:
                break
            following = _orthonormalize(following - (basis @ following.mT).mT @ basis)
        return following


def _remaining_gain(
    values: Tensor, residuals: Tensor, unseen: float, early: tuple[int, float], space: _KrylovSpace
) -> tuple[float, float]:
    """Estimate how much more the top k eigenvalues would sum to if the iteration went on, and its rate per block.

    The next block gains about u = sum_i |K u_i - theta_i u_i|^2 / (theta_i - mean of the unseen eigenvalues). The
    blocks since the early look gained u / r + u / r^2 + ...; that gives the rate r, and what follows sums to
    u / (1 - r). Twice that covered every spectrum tried but the uniform one, where it was 10 % short.
    """
    upcoming = float((residuals / torch.maximum(values - unseen, 0.1 * values).clamp_min(1e-300)).sum())
    blocks, gained = (space.size - early[0]) // space.block, float(values.sum()) - early[1]
    low, high = 1e-3, 0.97
    for _ in range(40):
        ratio = math.sqrt(low * high)
        if sum(upcoming * ratio**-i for i in range(1, blocks + 1)) > gained:
            low = ratio
        else:
            high = ratio
    return 2 * upcoming / (1 - high), high


def _complement_trace(operator: Operator, basis: Tensor, generator: torch.Generator, probes: int = 32) -> float:
    """Estimate the trace of K on the complement of the basis with random signs (Hutchinson)."""
    n = basis.shape[1]
    signs = torch.randint(0, 2, (n, probes), generator=generator).to(basis) * 2 - 1
    signs = signs - basis.mT @ (basis @ signs)
    return float((signs * operator(signs)).double().sum()) / probes
