"""SVD-LLM v2: the whitened truncation of SVD-LLM by eigen-decomposition, and removed shares by the loss of each layer.

    E[x x^T] = U_s S U_s^T,    W' = trunc_k(W U_s S^(1/2)) S^(-1/2) U_s^T
    within the matrices of one type:  r_i = |group| R s_i / sum_j s_j,    s_i = 1 / log L_i

L_i is the Frobenius norm of the output's error over all calibration vectors with every matrix at the common share R.
The truncation is the same optimum as in `svd-llm` without its update; only the allocation is new.

The formula breaks where L_i <= 1, and depends on how many vectors there are. Where the smallest L of a group is below
e, the group's are scaled so that it is e and s_i is at most 1; else they are used as they are. R is scaled until the
budget is met, since shares are cut off at full rank and rounded to ranks.

Structure: low rank. Metric: input second moment. Budget: shares by 1 / log of the loss within each type. Solver:
eigen-decomposition. Trained: nothing.

Source: Wang et al. 2025, "SVD-LLM V2: Optimizing singular value truncation for large language model compression",
Algorithm 1. An independent comparison (lems-svd/lems) finds the allocation no better than uniform.
"""

from eckart.methods.compress.recipe import Recipe, input_moment


def svd_llm_v2() -> Recipe:
    """SVD of the whitened weight, shares by the logarithm of the loss within each type of layer."""
    return Recipe(metric=input_moment, allocation="log-loss", uses_inputs=True)
