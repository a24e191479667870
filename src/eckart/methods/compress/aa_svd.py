"""AA-SVD: anchored and adaptive SVD, every layer fitted on the inputs it will really see.

    min over rank W' <= k of E |W x - W' x^|^2,    W' = trunc_k( W E[x x^^T] L^(-T) ) L^(-1),  L L^T = E[x^ x^^T]
    x the input in the original model, x^ the input behind the layers compressed so far; then 25 epochs of blockwise
    reconstruction of everything in the block, AdamW at 1e-4

Structure: low rank. Metric: shifted inputs, anchored at the original output. Budget: uniform. Solver: closed form,
block by block and inside a block in execution order. Trained: blockwise, on the calibration texts (`heal=0` for none).

Source: "AA-SVD" 2026 (arXiv 2604.02119), objective 4 and its local refinement; the authors' code ships objective 2.
"""

from eckart.fit import Metric
from eckart.fit import metric as build_metric
from eckart.methods.compress.recipe import LayerData, Recipe, check_share, input_moment, joint_moments


def aa_svd(*, anchor: float = 1.0) -> Recipe:
    """Sequential SVD on shifted inputs with the original outputs as target, then blockwise healing.

    Args:
        anchor: share of the original output in the target; 1 is the paper's objective 4, 0 its objective 3.
    """
    check_share("anchor", anchor)

    def metric(data: LayerData) -> Metric:
        if data.cross is None:  # before the sequential pass, for predictions
            return input_moment(data)
        original, cross = joint_moments(data.cross)
        return build_metric(original.second, shifted=data.cross.shifted.second, cross=cross, anchor=anchor)

    return Recipe(metric=metric, uses_inputs=True, sequential=True, heal=25)
