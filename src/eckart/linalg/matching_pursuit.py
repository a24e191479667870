"""Orthogonal matching pursuit for many signals at once, from Gram matrix and correlations alone.

For a signal x and atoms d_1, ..., d_k: choose the atom that correlates most with the residual, project x on all atoms
chosen so far, repeat. G = D D^T and D x are all that is needed. With q_1, q_2, ... the chosen atoms made orthonormal
one after the other, q_j = sum_i P_ij d_(chosen i), P upper triangular, the correlations of all atoms with q_j are a sum
of j rows of G, and those with the residual lose <q_j, x> times that. All signals take each step together; the code of
the signal is P <q, x>.

Legend: T signals, k atoms, s non-zeros per signal.

Source: Rubinstein, Zibulevsky and Elad 2008, "Efficient implementation of the K-SVD algorithm using batch orthogonal
matching pursuit", which holds the Cholesky factor of the chosen atoms' Gram matrix where this holds its inverse, P.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.errors import EckartError

# Correlations of this many numbers at a time: they stay in cache from step to step.
CHUNK_NUMBERS = 1 << 17
# An atom whose part outside the span of those chosen is smaller than this (squared) adds nothing but rounding.
DEPENDENT = 1e-10


def orthogonal_matching_pursuit(gram: Tensor, correlations: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Code signals by `nonzeros` atoms each.

    Args:
        gram: G = D D^T of the atoms, (k, k), floating; atoms of any length, though the choice favours long ones.
        correlations: D x of every signal, (T, k).
        nonzeros: s, at most k.

    Returns:
        Atoms (T, s) int64, those of a signal in the order chosen and distinct, and coefficients (T, s). A signal that
        fewer atoms express exactly has zeros at the end.

    Raises:
        EckartError: for sizes that do not fit, or s beyond the atoms.
    """
    k = gram.shape[0]
    if gram.shape != (k, k) or correlations.ndim != 2 or correlations.shape[1] != k:
        raise EckartError(
            f"matching pursuit needs a Gram matrix (k, k) and correlations (T, k), got {tuple(gram.shape)} and "
            f"{tuple(correlations.shape)}"
        )
    if not 0 < nonzeros <= k:
        raise EckartError(f"matching pursuit: {nonzeros} non-zeros were asked for with {k} atoms")
    gram, correlations = gram.detach(), correlations.detach().to(gram.dtype)
    parts = [_coded(gram, chunk, nonzeros) for chunk in correlations.split(max(1, CHUNK_NUMBERS // k))]
    return torch.cat([atoms for atoms, _ in parts]), torch.cat([values for _, values in parts])


def _coded(gram: Tensor, correlations: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    atoms, values, useful = _pursue(gram, correlations, nonzeros, masked=False)
    again = (~useful.all(dim=1)).nonzero().flatten()
    if again.numel():  # nothing but rounding was left to choose by, so an atom may have been chosen twice
        atoms[again], values[again], _ = _pursue(gram, correlations[again], nonzeros, masked=True)
    return atoms, values


def _pursue(gram: Tensor, correlations: Tensor, nonzeros: int, *, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return atoms, coefficients and which of the steps (T, s) added anything.

    Atoms already chosen have no correlation left, so they need to be masked only where no other atom has.
    """
    count, k = correlations.shape
    signals = torch.arange(count, device=gram.device)
    left = correlations.clone()  # correlations of the residual
    atoms = torch.empty(count, nonzeros, dtype=torch.int64, device=gram.device)
    inverse = gram.new_zeros(count, nonzeros, nonzeros)  # P
    projected = gram.new_zeros(count, nonzeros)  # <q_j, x>
    useful = torch.ones(count, nonzeros, dtype=torch.bool, device=gram.device)
    chosen = torch.zeros(count, k if masked else 0, dtype=torch.bool, device=gram.device)
    limit = DEPENDENT if gram.dtype == torch.float64 else 1e3 * DEPENDENT
    for step in range(nonzeros):
        magnitude = left.abs()
        if masked:
            magnitude.masked_fill_(chosen, -1.0)
        best = magnitude.argmax(dim=1)
        if masked:
            chosen[signals, best] = True
        atoms[:, step] = best
        size = gram.diagonal()[best]
        earlier = inverse[:, :step, :step]
        coordinates = earlier.mT @ gram[atoms[:, :step], best[:, None]].unsqueeze(2)  # <q_i, new atom>
        outside = size - coordinates.square().sum((1, 2))
        useful[:, step] = outside > limit * size
        scale = torch.where(useful[:, step], outside, 1.0).rsqrt() * useful[:, step]
        inverse[:, :step, step] = -scale[:, None] * (earlier @ coordinates).squeeze(2)
        inverse[:, step, step] = scale
        projected[:, step] = left[signals, best] * scale
        weights = inverse[:, : step + 1, step] * -projected[:, step, None]
        left += F.embedding_bag(atoms[:, : step + 1], gram, per_sample_weights=weights, mode="sum")
    return atoms, (inverse @ projected.unsqueeze(2)).squeeze(2), useful
