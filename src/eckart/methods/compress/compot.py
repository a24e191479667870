"""COMPOT: sparse codes over orthogonal atoms, both steps in closed form.

    min over S, A of | W L - S A |^2,  A A^T = I:    S = keep_s(W L A^T),    A = P Q^T with S^T W L = P diag Q^T

Structure: sparse codes times a dense dictionary D = A L^-1. Metric: second moment of the input. Budget: uniform.
Solver: hard thresholding and Procrustes in turn, 20 rounds. Trained: nothing.

Source: COMPOT 2026, the orthogonal sibling of CoSpaDi by the same group; 20 iterations and k / s = 2 as reported there.
"""

from eckart.fit.dictionary import orthogonal_learner
from eckart.fit.families import dictionary_family
from eckart.methods.compress.recipe import Recipe, check_least, input_moment


def compot(*, ratio: float = 2.0, iterations: int = 20) -> Recipe:
    """Dictionary of orthogonal atoms by hard thresholding and Procrustes.

    Args:
        ratio: atoms per non-zero, k / s.
        iterations: rounds of thresholding and rotating.
    """
    check_least("ratio", ratio, 1)
    check_least("iterations", iterations, 0)
    family = dictionary_family(orthogonal_learner(iterations), ratio)
    return Recipe(metric=input_moment, families=(family,), uses_inputs=True)
