"""The k-th smallest of many numbers: a sample brackets it, so that few have to be looked at twice.

Source: Floyd and Rivest 1975, "Expected Time Bounds for Selection".
"""

import math

from torch import Tensor

# Fewer numbers are not sampled.
FEW = 1 << 14
# Every so manieth number is in the sample: a prime, so that it goes round the columns of most matrices.
STRIDE = 89
# Standard deviations of the sampled rank on each side of the bracket.
WIDTH = 4.0


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest number, k from 1 on: (count,) -> ()."""
    count = values.shape[0]
    if count < FEW:
        return values.kthvalue(k).values
    sample = values[::STRIDE]
    size, share = sample.shape[0], k / count
    off = WIDTH * math.sqrt(size * share * (1 - share)) + 1
    low, high = (sample.kthvalue(min(max(round(share * size + d), 1), size)).values for d in (-off, off))
    smaller = values < low
    below, between = int(smaller.count_nonzero()), values[(values <= high) ^ smaller]
    if not 0 < k - below <= between.shape[0]:  # the sample misled, as an order in the numbers can make it
        return values.kthvalue(k).values
    return between.kthvalue(k - below).values
