"""Low-rank maps of codes that can be cut: a component has scales of its own, so the first k are a map of codes again.

    U' = codes of U, column by column under B,    V = tril(U'^T B U')^-1 U'^T B W*,    V' = codes of V under G^

Row j of V is the best one given the rows before it, whatever comes after, so that every number of first components is
fitted to U as it was rounded. For an exact U, whose columns are orthogonal under B, that is V itself (fit/refit.py). Of
an embedding, whose rows are looked up, groups run along the rows of U and span components; columns are balanced before.

Legend: W* (m, n) the unconstrained optimum, U (m, k), V (k, n), B the output moment, G^ the moment of what is seen.
"""

import torch
from torch import Tensor

from eckart.fit.coded import balance, moment_matrix
from eckart.fit.metric import Metric, weighted
from eckart.fit.quantize import Coding, quantize
from eckart.fit.regression import unconstrained
from eckart.maps import LowRank, Quantized


def up_codes(factors: LowRank, metric: Metric, coding: Coding, dtype: torch.dtype, *, table: bool) -> Quantized:
    """Return the codes of the left factor.

    Args:
        factors: U and V, as `Regression.factors` returns them.
        metric: what they were fitted under.
        coding: how numbers are stored.
        dtype: of scales, zero points and levels.
        table: whether rows are looked up.

    Returns:
        A row of codes per component, (k, m); of a table, a row of codes per token, (m, k).
    """
    if not table:
        return quantize(factors.up.mT, coding, metric.outputs, axis="rows", dtype=dtype)
    scales = balance(factors, moment_matrix(metric.seen, factors.down))
    return quantize(factors.up * scales, coding, outputs=metric.outputs, axis="rows", dtype=dtype)


def down_codes(
    weight: Tensor, ups: Quantized, metric: Metric, coding: Coding, dtype: torch.dtype, *, table: bool
) -> Quantized:
    """Return the codes of the right factor, fitted to the left one as rounded: a row per component, (k, n).

    Args:
        weight: W (m, n).
        ups: codes of the left factor, as `up_codes` returns them.
        metric: what close means; its inputs may differ from those that gave the left factor.
        coding: how numbers are stored.
        dtype: of scales, zero points and levels.
        table: whether rows are looked up.
    """
    up = ups.to(torch.float64).dense()
    up = up if table else up.mT
    dual = weighted(up, metric.outputs)
    normal = (dual.mT @ up).tril()
    diagonal = normal.diagonal()
    diagonal.copy_(torch.where(diagonal > 0, diagonal, 1.0))  # a component of zeros adds nothing
    down = torch.linalg.solve_triangular(normal, dual.mT @ unconstrained(weight.double(), metric), upper=False)
    return quantize(down, coding, metric.seen, axis="rows", dtype=dtype)
