"""Reduced-rank regression: the best map of rank k under a metric, in closed form, with the error of every rank.

    min over rank W' <= k and c of  E | T (W x - W' x^ - c) |^2
    W* = W C G^^-1,  K = T W* G^ W*^T T^T = V diag(s^2) V^T,  W' = T^-1 V_k V_k^T T W*,  c = W E[x] - W' E[x^]

Eigen-decomposes the smaller side in float64. If n < m that is L W*^T B W* L = R diag(s^2) R^T with L L = G^, and
T^-1 V_k = W* L R_k s^-1, so no root of the larger side is ever taken. Neither moment needs to be regular: roots have
their smallest eigenvalues raised to 1e-12 of the largest, and directions without data keep W.

Plain SVD, FWSVD, ASVD, SVD-LLM, AFM, KFAC-SVD and AA-SVD are special cases (Izenman 1975, "Reduced-rank regression for
the multivariate linear model", for the form without T).
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit.error import best_bias, error_of
from eckart.fit.metric import Metric, weighted, weighted_rows
from eckart.linalg import TopEigen, all_finite, regular_cholesky, top_eigen
from eckart.maps import LinearMap, LowRank, storage

# Eigenvalues of K below this share of the largest are rounding in float64: such directions carry no error.
NUMERICAL_RANK = 1e-13
# Directions of inputs with less than this share of the largest second moment count as unseen.
SINGULAR = 1e-10


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted layer.

    Attributes:
        map: the map W', in the dtype asked for.
        bias: (m,), or None if the metric is uncentred and the layer had none.
        error: E |T (W x - W' x^ - c)|^2 before rounding to that dtype.
        relative: the error over E |T W x|^2, that of the zero map.
    """

    map: LinearMap
    bias: Tensor | None
    error: float
    relative: float


@dataclass(frozen=True, slots=True)
class Regression:
    """The solution of the regression for every rank at once.

    Attributes:
        weight: W (m, n), as given.
        target: W* (m, n), the unconstrained optimum; float64, or the working dtype of the randomized solver.
        metric: the metric minimised.
        eigen: the eigenpairs of K on its smaller side.
        side: "outputs" if K is (m, m), "inputs" if (n, n).
        roots: the root of that side's moment and its inverse, each (size, size), (size,), or None for the identity.
        total: E |T W x|^2, the error of the zero map with the best bias.
        irreducible: the error that no rank removes: that of W*.
    """

    weight: Tensor
    target: Tensor
    metric: Metric
    eigen: TopEigen
    side: str
    roots: tuple[Tensor, Tensor] | None
    total: float
    irreducible: float

    @property
    def rank(self) -> int:
        """The largest useful rank among those computed: the numerical rank of K."""
        values = self.eigen.values
        return int((values > NUMERICAL_RANK * values[0]).sum()) if values.numel() else 0

    def errors(self) -> Tensor:
        """Return the error of rank 0, 1, ..., as far as eigenpairs were computed, float64."""
        return self.irreducible + self.eigen.tails()

    def factors(self, rank: int) -> LowRank:
        """Return the optimal factors of a rank (or the numerical rank, if smaller), balanced, in the target's dtype.

        Raises:
            EckartError: for a negative rank, or one beyond those the regression was solved for.
        """
        computed = self.eigen.values.shape[0]
        if rank < 0 or (rank > computed and computed < min(self.weight.shape)):
            raise EckartError(f"a map of rank {rank} was asked of a regression solved for ranks 0 to {computed}")
        k = min(rank, self.rank)
        vectors = self.eigen.vectors[:, :k].to(self.target.dtype)
        root, inverse = self.roots or (None, None)
        if self.side == "outputs":
            up, down = weighted(vectors, inverse), weighted(vectors, root).mT @ self.target
        else:
            up = self.target @ weighted(vectors, root)  # T^-1 V s
            dual = weighted(up, self.metric.outputs)
            if self.eigen.method == "dense":
                scale = self.eigen.values[:k].rsqrt()
                up, dual = up * scale, dual * scale
            else:  # approximate eigenvectors: make T up orthonormal again, so that W' is the best in their span
                factor = torch.linalg.cholesky(up.mT @ dual)
                up, dual = (torch.linalg.solve_triangular(factor, t.mT, upper=False).mT for t in (up, dual))
            down = dual.mT @ self.target
        sizes = torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)
        tiny = torch.finfo(up.dtype).tiny
        balance = (sizes[1] / sizes[0].clamp_min(tiny)).clamp_min(tiny).sqrt()
        return LowRank(up * balance, down / balance[:, None])

    def fit(
        self, rank: int, stored: str = "lowrank", dtype: torch.dtype = torch.float32, bias: Tensor | None = None
    ) -> Fit:
        """Return the fitted layer of a rank.

        Args:
            rank: k; the map has a smaller rank if the target itself has.
            stored: name of a `Storage`: "lowrank" or "pivoted".
            dtype: dtype of the numbers stored. The bias is fitted to the rounded map.
            bias: the layer's own bias (m,), added to the fitted one.
        """
        factors = self.factors(rank)
        map_ = storage(stored).build(factors).to(dtype)
        offset = None if bias is None else bias.double()
        change = best_bias(self.weight, map_, self.metric)
        if change is not None:
            offset = change if offset is None else offset + change
        error = float(self.errors()[factors.rank])
        relative = error / self.total if self.total > 0 else 0.0
        return Fit(map_, None if offset is None else offset.to(dtype), error, relative)


def regress(
    weight: Tensor, metric: Metric | None = None, *, rank: int | None = None, accuracy: float = 0.0
) -> Regression:
    """Solve the reduced-rank regression of a layer.

    Args:
        weight: W (m, n), any floating dtype.
        metric: what close means; None for the Frobenius norm (plain SVD).
        rank: largest rank needed; None for all (one decomposition gives every rank).
        accuracy: allowed relative excess of the root of the error over the optimum, for the randomized solver; 0 asks
            for the exact one. Only worth giving for matrices of a thousand rows and more, with a rank.

    Returns:
        A `Regression`; `factors(k)` and `errors()` cost one multiplication each.

    Raises:
        EckartError: for a weight that is not a finite, non-empty matrix, or a metric of other sizes.
    """
    metric = metric or Metric()
    if weight.ndim != 2 or 0 in weight.shape:
        raise EckartError(f"a fit needs a non-empty matrix, got a tensor of shape {tuple(weight.shape)}")
    if not weight.is_floating_point() or not all_finite(weight):
        raise EckartError(
            f"the weight {tuple(weight.shape)} of dtype {weight.dtype} must be floating without NaN or Inf"
        )
    metric.check(weight)
    w = weight.detach()
    side = "outputs" if w.shape[0] <= w.shape[1] else "inputs"
    inner, roots = (
        (metric.seen, metric.roots("outputs")) if side == "outputs" else (metric.outputs, metric.roots("seen"))
    )
    if accuracy > 0 and metric.shifted is None and rank is not None:
        eigen = _fast_eigen(w, inner, roots, side, rank, accuracy)
        target = w.to(torch.promote_types(w.dtype, eigen.vectors.dtype))
    else:
        target = unconstrained(w.double(), metric)
        eigen = top_eigen(_gram(target, inner, roots, side), rank)
    total, irreducible = eigen.trace, 0.0
    if metric.shifted is not None and metric.inputs is not None:
        zero = error_of(w, torch.zeros_like(w), metric)
        total = max(zero, eigen.trace)
        irreducible = total - eigen.trace
    return Regression(w, target, metric, eigen, side, roots, total, irreducible)


def unconstrained(w: Tensor, metric: Metric) -> Tensor:
    """Return W* = W C G^^-1; directions in which G^ is numerically singular keep W."""
    if metric.shifted is None or metric.cross is None:
        return w
    shifted = metric.shifted
    moved = w @ (metric.cross - shifted)  # W* = W + W (C - G^) G^^-1
    factor = regular_cholesky(shifted, SINGULAR)
    if factor is not None:
        return w + torch.cholesky_solve(moved.mT, factor).mT
    values, vectors = torch.linalg.eigh(shifted)
    largest = float(values[-1]) if values.numel() else 0.0
    seen = values > SINGULAR * largest if largest > 0 else torch.zeros_like(values, dtype=torch.bool)
    basis = vectors[:, seen]
    target: Tensor = w + ((moved @ basis) / values[seen]) @ basis.mT
    return target


def _gram(target: Tensor, inner: Tensor | None, roots: tuple[Tensor, Tensor] | None, side: str) -> Tensor:
    """Return K on its smaller side: T W* G^ W*^T T^T (m, m) or L W*^T B W* L (n, n)."""
    a = target if side == "outputs" else target.mT
    gram = a @ weighted(a.mT, inner)
    return gram if roots is None else weighted(weighted(gram, roots[0]).mT, roots[0])


def _fast_eigen(
    weight: Tensor, inner: Tensor | None, roots: tuple[Tensor, Tensor] | None, side: str, rank: int, accuracy: float
) -> TopEigen:
    """Find the leading eigenpairs of K by multiplying with its factors only; K itself is never formed."""
    a = weight if side == "outputs" else weight.mT
    parts = {"a": a, "inner": inner, "root": roots[0] if roots else None}
    copies: dict[torch.dtype, dict[str, Tensor | None]] = {}

    def operator(block: Tensor) -> Tensor:
        if block.dtype not in copies:
            copies[block.dtype] = {k: None if t is None else t.to(block.dtype) for k, t in parts.items()}
        p = copies[block.dtype]
        a = cast(Tensor, p["a"])
        # As rows: BLAS multiplies (b, n) by a large matrix or its transpose at full speed, columns at two thirds of it.
        rows = weighted_rows(weighted_rows(block.mT, p["root"]) @ a, p["inner"])
        return weighted_rows(rows @ a.mT, p["root"]).mT

    # The excess of a squared error is twice that of its root.
    return top_eigen(operator, rank, size=a.shape[0], accuracy=2 * accuracy, device=weight.device)
