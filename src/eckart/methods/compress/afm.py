"""AFM: atomic feature mimicking, principal components of the layer's output with a free bias.

    Sigma = E[y y^T] - E[y] E[y]^T = U diag U^T,    W_1 = U_k^T W,  W_2 = U_k,  b = (I - U_k U_k^T) E[y] + U_k U_k^T b_0

Structure: low rank with bias. Metric: centred input covariance (the covariance of the output is W Cov(x) W^T).
Budget: uniform. Solver: eigen-decomposition of the output covariance. Trained: nothing.

Source: Yu and Wu 2023, "Compressing transformers: features are low-rank, but weights are not!", section 3.2, as used
for click-through-rate models by yuhao318/Atomic_Feature_Mimicking.
"""

from eckart.fit import Metric
from eckart.fit import metric as build_metric
from eckart.methods.compress.recipe import LayerData, Recipe, raw_moments


def output_covariance(data: LayerData) -> Metric:
    """Return the metric whose optimum is PCA of the layer's output."""
    mean, second = raw_moments(data)
    return build_metric(second, mean=mean)


def afm() -> Recipe:
    """PCA of every layer's output, with the bias that centring gives for free."""
    return Recipe(metric=output_covariance, uses_inputs=True, centred=True)
