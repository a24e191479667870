"""Round to nearest: every weight as the nearest of 2^b values between the extremes of its group; no data.

    W'_ij = scale_ig (c_ij - 2^(b-1)) + zero_ig,    scale_ig = (max - min over group g of row i) / (2^b - 1)

Structure: dense, in codes of b bits with a scale and a zero point per group. Metric: none, every entry by itself.
Budget: none, all parameters remain. Solver: rounding. Trained: nothing. The baseline that every quantizer refines.

Source: as "RTN" in Frantar et al. 2022, "GPTQ", section 4, in groups of 128.
"""

from eckart.fit import Metric
from eckart.methods.compress.recipe import Recipe


def rtn() -> Recipe:
    """Every weight rounded to the nearest of a few values per group, data-free."""
    return Recipe(metric=lambda data: Metric(), reduces=False, bits=4, rounding="nearest", clip=False)
