"""Concatenated-matrix SVD: layers share a basis wherever the predicted error of truncating them together allows it.

    A_i = W_i S / |W_i S|,  S S^T = sum_i E[x_i x_i^T] over all layers of one projection
    merge C and D while  predicted e_r([A_C; A_D])^2  <=  threshold * sum_i e_{r_i}(A_i)^2

with r and r_i the ranks that the budget gives the merged group and its layers alone: sharing is decided by a stated
error at equal size, not by adjacency. The prediction comes from individual spectra, from residuals, or from an
incremental SVD (linalg/stacked.py, fit/clustering.py). The paper has neither whitening nor a budget. The threshold is
above 1 by default because the rounds that follow, of which the prediction knows nothing, win back more than a tenth; on
stories3m 1.1 was better than 1 at 0.8, 0.6 and 0.5, and than 1.2 at 0.5 where that was tried.

Structure: low rank with a shared right factor; layers in no group low rank of their own. Metric: input second moment,
summed over a group for the basis, each layer's own in the rounds that follow. Budget: uniform, a group as one layer.
Solver: SVD, then alternating closed forms. Trained: nothing.

Source: Shamrai 2026, "Concatenated Matrix SVD: Compression Bounds, Incremental Approximation, and Error-Constrained
Clustering" (arXiv 2601.11626).
"""

from eckart.fit.clustering import Algorithm
from eckart.methods.compress.recipe import Recipe, input_moment
from eckart.methods.compress.sharing import Sharing


def concatenated_svd(*, algorithm: Algorithm = "incremental", threshold: float = 1.1, rounds: int = 3) -> Recipe:
    """Low rank with a basis shared by those layers of a projection that are predicted to lose little by it.

    Args:
        algorithm: what the joint error is predicted from: "union" of the spectra, "residual" or "incremental" SVD.
        threshold: largest ratio of the joint error to that of the layers alone at equal size.
        rounds: alternations under each layer's own input moment; 0 for the common one.
    """
    sharing = Sharing(algorithm=algorithm, threshold=threshold, writers=True, rounds=rounds)
    return Recipe(metric=input_moment, uses_inputs=True, sharing=sharing)
