"""ROCKET: a dictionary in closed form, and a knapsack over sizes and sparsities.

    A = W L,  A^T A = U diag U^T,  V = A U_k;  importance_ij = |V_ij|^(1-lambda) (|V_ij| |L^-1 u_j|)^lambda
    S = the s most important entries of every row of V,    D = (S^T S)^-1 S^T W

Structure: sparse codes times a dense dictionary, k / s from 1 to 3. Metric: second moment of the input. Budget:
knapsack over size and k / s; its cost here is the error under the metric relative to the layer's output. Solver: one
eigen-decomposition. Trained: nothing (the authors' optional 100 Adam steps are left out).

Source: mts-ai/ROCKET 2026; lambda = 0.5 and the range of k / s as in the authors' code.
"""

from eckart.fit.dictionary import closed_form_learner
from eckart.fit.families import dictionary_family
from eckart.methods.compress.recipe import Recipe, check_share, input_moment

RATIOS = (1.0, 1.5, 2.0, 3.0)


def rocket(*, balance: float = 0.5) -> Recipe:
    """Closed-form dictionaries, sizes and sparsities by knapsack.

    Args:
        balance: lambda, how much atoms weigh by their length in the space of the weights.
    """
    learner = closed_form_learner(check_share("balance", balance))
    families = tuple(dictionary_family(learner, ratio, f"dictionary {ratio:g}:1") for ratio in RATIOS)
    return Recipe(metric=input_moment, families=families, allocation="knapsack", uses_inputs=True)
