"""FWSVD: singular value decomposition weighted by the Fisher information of each output row.

    I_i = sum_j E[(dL / dW_ij)^2],    W' = diag(I)^(-1/2) trunc_k( diag(I)^(1/2) W )

Structure: low rank. Metric: rows weighted by their Fisher information, inputs ignored. Budget: uniform. Solver: SVD.
Trained: nothing. One backward pass over the calibration texts, expectation over sequences, observed labels.

Source: Hsu et al. 2022, "Language model compression with weighted low-rank factorization", eq. 4-6.
"""

from eckart.errors import EckartError
from eckart.fit import Metric
from eckart.methods.compress.recipe import Labels, LayerData, Recipe


def fwsvd(*, labels: Labels = "observed") -> Recipe:
    """SVD weighted by the Fisher information of each output row.

    Args:
        labels: labels of the gradients; models without next-token loss need "sampled".
    """

    def metric(data: LayerData) -> Metric:
        if data.gradients is None:
            raise EckartError("fwsvd needs gradients")
        return Metric(outputs=data.gradients.row_fisher)

    return Recipe(metric=metric, uses_gradients=True, labels=labels)
