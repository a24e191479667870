"""ZS-SVD: zero-sum truncation of whitened singular values by their first-order change of the loss.

    L L^T = E[x x^T],  W L = U diag(sigma) V^T,    change of dropping value i:  -g_i sigma_i,
    g_i = (U^T (dL/dW L^(-T)) V)_ii,    dL/dW the mean gradient of the next-token loss over the calibration texts

One by one, from the tail of every layer, the value of least |change| is dropped whose sign brings the sum of changes
back to zero, until the budget is met; layers left above their break-even rank stay dense. The change is that of
removing the rank-one part u_i sigma_i v_i^T L^(-1) of W, whatever root of E[x x^T] is taken.

Then, several times: the truncated weights W_r are corrected, and all are scored and truncated again,

    W <- W_r + < g, W_0 - W_r > / |g|^2  g,    g = dL/dW at W_r,  W_0 the original weights

with the gradient of one sample, drawn at random. The authors correct five times, for all models but LLaMA-1. They take
that of one sample for the scores as well, here it is that of all. Their int8 storage is `bits`.

Structure: low rank or dense. Metric: input second moment. Budget: zero-sum heap on first-order changes of the loss.
Solver: SVD, projected gradient steps between. Trained: nothing.

Source: Abbasi et al. 2026, "Zero Sum SVD: Balancing loss sensitivity for low rank LLM compression"; the floor of 0.1 of
the break-even rank as in mint-vu/Zero-Sum-SVD.
"""

from torch import Tensor

from eckart.errors import EckartError
from eckart.fit import Regression
from eckart.methods.compress.recipe import LayerData, Recipe, check_least, check_share, input_moment


def first_order_change(data: LayerData, regression: Regression) -> Tensor:
    """Return the first-order change of the loss by rank: the sum of -g_i sigma_i over the values dropped.

    Returns:
        (min(m, n) + 1,) float64; the last entry, of full rank, is 0.
    """
    if data.weight_gradient is None:
        raise EckartError("zero-sum scores need the gradients of the weights, which the recipe did not ask for")
    factors = regression.factors(min(data.weight.shape))
    parts = ((factors.up.mT @ data.weight_gradient.to(factors.up.dtype)) * factors.down).sum(1).double()
    out = parts.new_zeros(min(data.weight.shape) + 1)
    out[: parts.shape[0]] = -parts.flip(0).cumsum(0).flip(0)
    return out


def zs_svd(*, floor: float = 0.1, corrections: int = 5) -> Recipe:
    """SVD of the whitened weight, values dropped so that first-order changes of the loss cancel.

    Args:
        floor: share of the break-even rank below which no layer is truncated while others can be.
        corrections: how often the truncated weights take a projected gradient step and all are truncated again.
    """
    check_share("floor", floor)
    check_least("corrections", corrections, 0)
    return Recipe(
        metric=input_moment,
        allocation="zero-sum",
        uses_inputs=True,
        uses_weight_gradients=True,
        labels="observed",
        score=first_order_change,
        floor=floor,
        corrections=corrections,
    )
