"""Dictionaries with sparse codes: every row of a weight from a few of k atoms, under the metric of its inputs.

    min over S, D of  E |W x - S D x|^2 = | W L - S A |^2,    A = D L,  L L^T = E[x x^T],  s non-zeros per row of S

Three ways to alternate between codes S (m, k) and atoms A (k, n), all in the whitened space, and one closed form that
ends each of them, with the output metric and shifted inputs of the regression (fit/regression.py) where they are known:

    D* = (S^T B S)^-1 S^T B W*,    W* = W C G^^-1

Legend: W (m, n), k atoms, s non-zeros per row, G = E[x x^T], W* the unconstrained optimum of the metric.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit.metric import Metric, weighted, weighted_rows
from eckart.fit.regression import unconstrained
from eckart.linalg import largest_in_rows, orthogonal_matching_pursuit, polar_factor
from eckart.maps import Dense, LinearMap, Product, bitmap

# Relative weight of the identity in the normal equations of the atoms: an atom that no row uses stays finite.
RIDGE = 1e-10


@dataclass(frozen=True, slots=True)
class Signals:
    """What codes are learned of, the same at any size.

    Attributes:
        values: rows of W* L, (m, n), scaled by `row_weights`.
        axes: their right singular vectors as rows, the leading first, (n, n).
        inverse: inverse of L, (n, n), (n,) if diagonal, or None for the identity.
    """

    values: Tensor
    axes: Tensor
    inverse: Tensor | None


# (signals, k, s) -> codes S (m, k), dense with zeros
Learner = Callable[[Signals, int, int], Tensor]


def dictionary_fitter(weight: Tensor, metric: Metric, learner: Learner) -> Callable[[int, int], LinearMap]:
    """Return what gives sparse codes times a dense dictionary, the nearest that a learner finds, at any size.

    Args:
        weight: W (m, n).
        metric: what close means. The codes are learned under the inputs' second moment and the diagonal of the
            outputs'; the dictionary is fitted to them under all of it.
        learner: `matching_pursuit_learner`, `orthogonal_learner` or `closed_form_learner`.

    Returns:
        (k atoms, s codes per row of W) -> `Product(Bitmap (m, k), Dense (k, n))`, float64, in m s + k n numbers and m k
        bits; it raises an `EckartError` for sizes beyond the matrix.
    """
    m, n = weight.shape
    target = unconstrained(weight.double(), metric)
    root, inverse = metric.roots("seen") or (None, None)
    rows = row_weights(metric, m)
    values = weighted_rows(target, root) * rows
    axes = torch.linalg.eigh(values.mT @ values)[1].flip(1).mT.contiguous()
    signals = Signals(values, axes, inverse)

    def fit(atoms: int, nonzeros: int) -> LinearMap:
        if not 0 < atoms <= n or not 0 < nonzeros <= atoms:
            raise EckartError(
                f"a dictionary of {atoms} atoms with {nonzeros} non-zeros per row does not fit a {m} x {n} matrix; "
                f"both must be positive, atoms at most {n}, non-zeros at most the atoms"
            )
        codes = learner(signals, atoms, nonzeros) / rows
        return Product((bitmap(codes, nonzeros), Dense(best_atoms(codes, target, metric.outputs))))

    return fit


def row_weights(metric: Metric, count: int) -> Tensor:
    """Return the root of the output metric's diagonal, (m, 1), at least 1e-6 of its largest.

    A row of codes may have any scale, so that rows can count by how much their output matters while codes are learned.
    """
    if metric.outputs is None:
        return torch.ones(count, 1, dtype=torch.float64)
    diagonal = metric.outputs.diagonal() if metric.outputs.ndim == 2 else metric.outputs
    largest = diagonal.max()
    return (diagonal / largest).clamp_min(1e-12).sqrt()[:, None] if largest > 0 else torch.ones_like(diagonal)[:, None]


def best_atoms(codes: Tensor, target: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Return the dictionary that fits codes best: D = (S^T B S)^-1 S^T B W*, (k, n).

    Args:
        codes: S (m, k).
        target: W* (m, n).
        outputs: B (m, m), (m,) if diagonal, or None for the identity.
    """
    dual = weighted(codes, outputs)
    normal = codes.mT @ dual
    normal.diagonal().add_(RIDGE * normal.diagonal().mean().clamp_min(torch.finfo(normal.dtype).tiny))
    return torch.cholesky_solve(dual.mT @ target, torch.linalg.cholesky(normal))


def matching_pursuit_learner(iterations: int, power_iterations: int = 1) -> Learner:
    """Return K-SVD: codes by orthogonal matching pursuit, then every atom and its codes by a rank-1 fit in turn.

    Args:
        iterations: rounds.
        power_iterations: steps towards the leading singular pair of each atom's residual.

    Source: Aharon, Elad and Bruckstein 2006, "K-SVD"; with power iterations instead of an SVD as in Rubinstein,
    Zibulevsky and Elad 2008, section 2.2.
    """

    def learn(signals: Signals, atoms: int, nonzeros: int) -> Tensor:
        values, dictionary = signals.values, signals.axes[:atoms]
        codes = _coded(values, dictionary, nonzeros)
        best = codes, _residual(values, codes, dictionary)
        for _ in range(iterations):
            codes, dictionary = _updated(values, codes, dictionary, power_iterations)
            codes = _coded(values, dictionary, nonzeros)
            error = _residual(values, codes, dictionary)
            if error < best[1]:
                best = codes, error
        return best[0]

    return learn


def orthogonal_learner(iterations: int) -> Learner:
    """Return alternation with orthonormal atoms: codes by hard thresholding, atoms by Procrustes.

    Args:
        iterations: rounds.

    Source: Lesage et al. 2005, "Learning unions of orthonormal bases with thresholded singular value decomposition".
    """

    def learn(signals: Signals, atoms: int, nonzeros: int) -> Tensor:
        values, dictionary = signals.values, signals.axes[:atoms]
        codes = keep_largest(values @ dictionary.mT, nonzeros)
        for _ in range(iterations):
            dictionary = polar_factor(codes.mT @ values)
            codes = keep_largest(values @ dictionary.mT, nonzeros)
        return codes

    return learn


def closed_form_learner(balance: float) -> Learner:
    """Return selection in the eigenbasis of the signals, without any iteration.

    Args:
        balance: lambda in [0, 1]: 0 keeps the coefficients largest in the whitened space, 1 those largest when their
            atom is weighed in the space of the weights.

    Source: ROCKET (mts-ai/ROCKET 2026): importance |V_ij|^(1-lambda) (|V_ij| |L^-1 u_i|)^lambda.
    """

    def learn(signals: Signals, atoms: int, nonzeros: int) -> Tensor:
        basis = signals.axes[:atoms]
        coefficients = signals.values @ basis.mT
        lengths = weighted_rows(basis, signals.inverse).norm(dim=1)
        return keep_largest(coefficients, nonzeros, importance=coefficients.abs() * lengths**balance)

    return learn


def keep_largest(codes: Tensor, nonzeros: int, importance: Tensor | None = None) -> Tensor:
    """Return codes with all but the `nonzeros` most important entries of every row set to zero.

    Args:
        codes: (m, k).
        nonzeros: s.
        importance: (m, k), by default the magnitudes.
    """
    kept = largest_in_rows(codes.abs() if importance is None else importance, nonzeros)
    return torch.where(kept, codes, 0.0)


def _coded(signals: Tensor, dictionary: Tensor, nonzeros: int) -> Tensor:
    chosen, values = orthogonal_matching_pursuit(dictionary @ dictionary.mT, signals @ dictionary.mT, nonzeros)
    return signals.new_zeros(signals.shape[0], dictionary.shape[0]).scatter(1, chosen, values)


def _updated(signals: Tensor, codes: Tensor, dictionary: Tensor, power_iterations: int) -> tuple[Tensor, Tensor]:
    """Fit each atom and the codes of the rows that use it to what the other atoms leave of those rows."""
    codes, dictionary = codes.clone(), dictionary.clone()
    residual = signals - codes @ dictionary
    for j in range(dictionary.shape[0]):
        users = codes[:, j].nonzero().flatten()
        if not users.numel():
            worst = int(residual.square().sum(1).argmax())  # an unused atom becomes the worst row's residual
            dictionary[j] = _unit(residual[worst], dictionary[j])
            continue
        own = residual[users] + torch.outer(codes[users, j], dictionary[j])
        atom, values = dictionary[j], codes[users, j]
        for _ in range(power_iterations):
            atom = _unit(values @ own, atom)
            values = own @ atom
        dictionary[j], codes[users, j] = atom, values
        residual[users] = own - torch.outer(values, atom)
    return codes, dictionary


def _unit(vector: Tensor, otherwise: Tensor) -> Tensor:
    length = float(vector.norm())
    return vector / length if length > 0 and math.isfinite(length) else otherwise


def _residual(signals: Tensor, codes: Tensor, dictionary: Tensor) -> float:
    return float((signals - codes @ dictionary).square().sum())
