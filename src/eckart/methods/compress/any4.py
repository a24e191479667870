"""any4: sixteen values per row, learned, instead of sixteen equal steps.

    W'_ij = scale_ig l_i(c_ij) + zero_ig,    min over levels l_i and codes c_i of  sum_j (scale_ig E|x_j| d_ij)^2

with d_ij the distance of the scaled weight from its level: weighted k-means in one dimension, for every row by itself,
from equal steps and from quantiles, the better of both.

Structure: dense, in codes of 4 bits with a scale and a zero point per group and a table of levels per row. Metric: mean
magnitudes of the inputs. Budget: none, all parameters remain. Solver: k-means. Trained: nothing.

Source: Elhoushi and Johnson 2025, "any4: Learned 4-bit numeric representation for LLMs"; groups of 128. The authors'
code weights distances by scale E|x| before k-means squares them, that is by its root; the square is the error at the
layer's output.
"""

from eckart.errors import EckartError
from eckart.fit import Metric
from eckart.methods.compress.recipe import LayerData, Recipe


def any4() -> Recipe:
    """A learned table of sixteen values per row, scaled per group."""

    def metric(data: LayerData) -> Metric:
        if data.inputs is None:
            raise EckartError("any4 needs input moments")
        return Metric(inputs=data.inputs.mean_abs.square())

    return Recipe(
        metric=metric, uses_inputs=True, reduces=False, bits=4, rounding="nearest", levels="learned", clip=False
    )
