"""What truncating several matrices together costs, bounded by what is known of each: A = [A_1; ...; A_g], (m_i, n).

Written for a common right factor, A_i ~ U_i V^T with one V for all, so that matrices are stacked on top of each other;
concatenation side by side is the same of the transposes. Legend: e_r(A)^2 = sum over j > r of s_j(A)^2 the least
squared error of rank r, s_j singular values in descending order, K = A^T A = K_1 + ... + K_g.

    lower   e_r(A)^2 >= sum_i e_r(A_i)^2                       Ky Fan: the top r of a sum are at most the sum of tops
    growth  s_j(A) >= max_i s_j(A_i), so
            e_r(A)^2 <= |A|^2 - sum_{j<=r} max_i s_j(A_i)^2    Weyl: adding rows lowers no singular value
    union   e_r(A)^2 <= |A|^2 - (the r largest of all s_j(A_i)^2)
    residual, for two blocks and any k <= r, with Q_k the k leading right singular vectors of A_1:
            e_r(A)^2 <= e_k(A_1)^2 + e_{r-k}(A_2 (I - Q_k Q_k^T))^2

Union: the leading vectors of every block that the r largest values belong to span at most r dimensions, and contain
each block's own leading space, so they capture that much of K. Among the r-subsets of all values is the one that growth
takes, max_i at every j, so union is never looser. Residual: Q_k and the leading right vectors of the residual are
orthogonal, span r dimensions, and leave of A_1 at most what Q_k leaves, of A_2 what both leave. Its second term is at
most e_{r-k}(A_2)^2 since a projection of A_2 has no larger singular values; with the k that union implies it is never
looser than union. Growth and union know the spectra alone; they cannot tell that blocks agree in direction.

A `Sketch` keeps the leading k right singular pairs, and stacking sketches truncates again. Each truncation only takes a
PSD part from K, so its singular values never exceed the true ones, and the truth lies between two stated errors:

    estimate_r - discarded <= e_r(A)^2 <= estimate_r = |A|^2 - sum_{j<=r} s_j(sketch)^2

Source: Shamrai 2026, "Concatenated Matrix SVD: Compression Bounds, Incremental Approximation, and Error-Constrained
Clustering" (arXiv 2601.11626), whose abstract names growth, bounds by incremental residuals and the incremental SVD;
the derivations here, union, lower and the certificate of the sketch are our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg.svd import truncated_svd


@dataclass(frozen=True, slots=True)
class Sketch:
    """The leading right singular pairs of a matrix that is not kept.

    Attributes:
        values: (k,) squared singular values, descending, float64.
        right: (k, n) orthonormal rows.
        energy: |A|^2 of the whole matrix.
        discarded: trace of what truncations took from A^T A.
    """

    values: Tensor
    right: Tensor
    energy: float
    discarded: float

    def errors(self) -> Tensor:
        """Return the estimate of e_r(A)^2 for rank 0 ... k, never below the truth; (k + 1,) float64."""
        captured = torch.cat((self.values.new_zeros(1), self.values.cumsum(0)))
        return (self.energy - captured).clamp_min(0.0)

    def error(self, rank: int) -> float:
        """Return the estimate of e_rank(A)^2; beyond the pairs kept, that of all of them."""
        return float(self.errors()[min(rank, self.values.shape[0])])

    def scaled(self, factor: float) -> "Sketch":
        """Return the sketch of `factor` times the matrix."""
        square = factor * factor
        return Sketch(self.values * square, self.right, self.energy * square, self.discarded * square)


def sketch(matrix: Tensor, rank: int | None = None) -> Sketch:
    """Return the leading right singular pairs of a matrix.

    Args:
        matrix: A (m, n).
        rank: pairs kept; None for all. Errors of ranks up to it are exact.

    Raises:
        EckartError: for a negative rank, or a matrix that is not finite.
    """
    return _truncated(matrix.double(), rank, float(matrix.double().square().sum()), 0.0)


def stacked(first: Sketch, second: Sketch, rank: int | None = None) -> Sketch:
    """Return the sketch of two matrices stacked on top of each other, from their sketches alone.

    Args:
        first: of A_1.
        second: of A_2.
        rank: pairs kept; None for all there are.
    """
    _check_width(first, second)
    rows = torch.cat([s.values.sqrt()[:, None] * s.right for s in (first, second)])
    return _truncated(rows, rank, first.energy + second.energy, first.discarded + second.discarded)


def _truncated(rows: Tensor, rank: int | None, energy: float, discarded: float) -> Sketch:
    found = truncated_svd(rows, rank)
    values = found.values.square()
    return Sketch(values, found.right, energy, discarded + float(found.errors[found.rank]))


def lower_bound(blocks: Sequence[Sketch], rank: int) -> float:
    """Return a lower bound of the error of truncating all blocks together: the sum of their own (Ky Fan).

    Exact blocks are needed: sketches must keep at least `rank` pairs of untruncated matrices.
    """
    return sum(block.error(rank) for block in blocks)


def growth_bound(blocks: Sequence[Sketch], rank: int) -> float:
    """Return an upper bound of the squared error of all blocks truncated together: singular values only grow."""
    longest = max(block.values.shape[0] for block in blocks)
    padded = torch.stack([torch.nn.functional.pad(b.values, (0, longest - b.values.shape[0])) for b in blocks])
    return max(_energy(blocks) - float(padded.amax(0)[:rank].sum()), 0.0)


def union_bound(blocks: Sequence[Sketch], rank: int) -> float:
    """Return an upper bound of the squared error of all blocks truncated together: the union of their spectra."""
    return max(_energy(blocks) - float(_largest(blocks, rank).values.sum()), 0.0)


def residual_bound(first: Sketch, second: Sketch, rank: int, *, splits: int = 3) -> float:
    """Return an upper bound from what the leading directions of one block leave of the other.

    Args:
        first: of A_1, which gives Q_k.
        second: of A_2.
        rank: r.
        splits: values of k tried, from the one that makes the bound no looser than `union_bound` up to r. Each costs
            the spectrum of one residual.
    """
    _check_width(first, second)
    kept = first.values.shape[0]
    least = int((_largest((first, second), rank).indices < kept).sum())
    most = min(rank, kept)
    tried = {round(least + (most - least) * i / max(splits - 1, 1)) for i in range(max(splits, 1))}
    common = (second.values.sqrt()[:, None] * second.right) @ first.right[:most].mT  # A_2's pairs along A_1's
    lost = second.energy - float(second.values.sum())  # what the sketch of A_2 does not hold counts as error
    return min(_split_error(first, second, common, k, rank) for k in sorted(tried)) + max(lost, 0.0)


def _split_error(first: Sketch, second: Sketch, common: Tensor, k: int, rank: int) -> float:
    # The Gram matrix of the residual's rows: those of A_2's pairs are orthogonal, the projection takes C C^T from them.
    gram = torch.diag(second.values) - common[:, :k] @ common[:, :k].mT
    left = torch.linalg.eigvalsh(gram)[: max(gram.shape[0] - (rank - k), 0)]
    return first.error(k) + float(left.clamp_min(0).sum())


def _largest(blocks: Sequence[Sketch], rank: int) -> torch.return_types.topk:
    values = torch.cat([block.values for block in blocks])
    return values.topk(min(rank, values.shape[0]))


def _energy(blocks: Sequence[Sketch]) -> float:
    return sum(block.energy for block in blocks)


def _check_width(first: Sketch, second: Sketch) -> None:
    widths = first.right.shape[1], second.right.shape[1]
    if widths[0] != widths[1]:
        raise EckartError(f"matrices of {widths[0]} and {widths[1]} columns cannot be stacked; they need as many")
