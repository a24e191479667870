"""ASVD: activation-aware SVD.

    S = diag(E|x_j|)^alpha,    W' = trunc_k(W S) S^(-1)

Structure: low rank. Metric: inputs by their mean magnitude, a diagonal stand-in for their second moment. Budget: every
layer truncated alone to 0.4, 0.5, ..., 0.9 of its numbers, the loss measured each time, one threshold for all.
Solver: SVD. Trained: nothing.

Source: Yuan et al. 2023, "ASVD: Activation-aware Singular Value Decomposition", eq. 5-8 and section 3.3; alpha = 0.5
and the levels as in the authors' code (hahnyuan/ASVD4LLM).
"""

from eckart.errors import EckartError
from eckart.fit import Metric
from eckart.methods.compress.recipe import LayerData, Recipe


def asvd(*, alpha: float = 0.5) -> Recipe:
    """SVD scaled by mean input magnitudes, ranks by measured sensitivity.

    Args:
        alpha: exponent of the scaling; 0 is plain SVD.
    """

    def metric(data: LayerData) -> Metric:
        if data.inputs is None:
            raise EckartError("asvd needs input moments")
        # Channels that were never active get the smallest scale seen, so that S stays invertible.
        magnitudes = data.inputs.mean_abs
        active = magnitudes[magnitudes > 0]
        floor = float(active.min()) if active.numel() else 1.0
        return Metric(inputs=magnitudes.clamp_min(floor).pow(2 * alpha))

    return Recipe(metric=metric, allocation="sensitivity", uses_inputs=True)
