"""CoSpaDi: a dictionary per matrix and a few of its atoms per output, guided by calibration data.

    min over S, D of | W L - S D L |^2,    L L^T = E[x x^T],  s non-zeros in every row of S,  k / s = 2

Structure: sparse codes times a dense dictionary. Metric: second moment of the input. Budget: uniform. Solver: K-SVD,
orthogonal matching pursuit and rank-1 updates in turn. Trained: nothing.

Source: Makhov et al. 2025, "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning"
(arXiv 2509.22075), per-layer variant, and with `group` its cross-layer one: one dictionary for the same projection of
that many adjacent blocks, under the sum of their moments, the codes private; k / s = 2 as there.
"""

from eckart.fit.dictionary import matching_pursuit_learner
from eckart.fit.families import dictionary_family
from eckart.methods.compress.recipe import Recipe, check_least, input_moment
from eckart.methods.compress.sharing import Sharing


def cospadi(*, ratio: float = 2.0, iterations: int = 20, group: int = 1) -> Recipe:
    """Dictionary learning by K-SVD on whitened weights.

    Args:
        ratio: atoms per non-zero, k / s.
        iterations: rounds of coding and updating.
        group: adjacent layers that share a dictionary; 1 for a dictionary each.
    """
    check_least("ratio", ratio, 1)
    check_least("iterations", iterations, 0)
    family = dictionary_family(matching_pursuit_learner(iterations), ratio)
    check_least("group", group, 1)
    sharing = Sharing(size=group, writers=True) if group > 1 else None
    return Recipe(metric=input_moment, families=(family,), uses_inputs=True, sharing=sharing)
