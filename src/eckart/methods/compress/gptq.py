"""GPTQ: rounding column after column, each column's error made up for by those not rounded yet.

    e = (w_j - q_j) / U_jj,   w_l <- w_l - e U_jl  for l > j,   U^T U = (H + 0.01 mean(diag H) I)^-1,   H = E[x^ x^^T]

Structure: dense, in codes of b bits with a scale and a zero point per group. Metric: second moment of the inputs, as
the layers before leave them. Budget: none, all parameters remain. Solver: error feedback in order of falling H_jj;
scales cover the extremes of each group in the weights as given (the options act-order and static-groups of the
authors' code). Trained: nothing.

Source: Frantar et al. 2022, "GPTQ: Accurate post-training quantization for generative pre-trained transformers",
Algorithm 1; damping 0.01 and groups of 128 as in the authors' code (IST-DASLab/gptq).
"""

from eckart.fit import Metric
from eckart.fit import metric as build_metric
from eckart.methods.compress.recipe import LayerData, Recipe, input_moment


def gptq() -> Recipe:
    """Rounding with error feedback under the second moment of the inputs."""

    def metric(data: LayerData) -> Metric:
        return input_moment(data) if data.cross is None else build_metric(data.cross.shifted.second)

    return Recipe(metric=metric, uses_inputs=True, sequential=True, reduces=False, bits=4, clip=False)
