"""KFAC-SVD (GFWSVD): both sides of the Kronecker-factored Fisher matrix.

    A = E[x x^T],  B = E[g g^T], g the loss gradient at the output, each shrunk towards its mean diagonal
    W' = L_B^(-T) trunc_k( L_B^T W L_A ) L_A^(-1)

Structure: low rank. Metric: input and output-gradient second moments. Budget: uniform (`allocation=calibrated` is
LEMS). Solver: eigen-decomposition. Trained: nothing. One backward pass, observed labels.

Source: "Generalized Fisher-Weighted SVD" 2025; the shrinkage of 0.1 and 0.3, without which it collapses on large
models, from the code of LEMS 2026 (lems-svd/lems). Its token-norm clipping is not part of this page.
"""

from eckart.fit import Metric
from eckart.fit import metric as build_metric
from eckart.methods.compress.recipe import Labels, LayerData, Recipe, check_share, gradient_moment, raw_moments


def kfac(*, input_shrinkage: float = 0.1, output_shrinkage: float = 0.3, labels: Labels = "observed") -> Recipe:
    """SVD under the Kronecker-factored Fisher metric.

    Args:
        input_shrinkage: share of the isotropic moment in A.
        output_shrinkage: share of the isotropic moment in B.
        labels: labels of the gradients; models without next-token loss need "sampled".
    """
    check_share("input_shrinkage", input_shrinkage)
    check_share("output_shrinkage", output_shrinkage)

    def metric(data: LayerData) -> Metric:
        return build_metric(
            raw_moments(data)[1],
            outputs=gradient_moment(data),
            input_shrinkage=input_shrinkage,
            output_shrinkage=output_shrinkage,
        )

    return Recipe(metric=metric, uses_inputs=True, uses_gradients=True, labels=labels, output_metric=True)
