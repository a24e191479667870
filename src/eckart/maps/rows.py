"""Some rows of the matrix of a map."""

import torch
from torch import Tensor

from eckart.maps.base import LinearMap, Scaled, Sum
from eckart.maps.bitmap import Bitmap
from eckart.maps.dense import Dense
from eckart.maps.lowrank import LowRank
from eckart.maps.quantized import Quantized
from eckart.maps.sparse import NM, Sparse


def rows_of(map_: LinearMap, start: int, stop: int) -> Tensor:
    """Return some rows of the matrix of a map, (stop - start, n), without the others wherever that is possible."""
    match map_:
        case Dense(weight):
            return weight[start:stop]
        case LowRank(up, down):
            return up[start:stop] @ down
        case Scaled(inner, scale):
            return scale * rows_of(inner, start, stop)
        case Sum(maps):
            return torch.stack([rows_of(one, start, stop) for one in maps]).sum(0)
        case Sparse(values, columns, starts, width):
            first, last = int(starts[start]), int(starts[stop])
            return Sparse(values[first:last], columns[first:last], starts[start : stop + 1] - first, width).dense()
        case NM(values, places, period):
            return NM(values[start:stop], places[start:stop], period).dense()
        case Bitmap(values, bits, width, nonzeros):
            return Bitmap(values[start:stop], bits[start:stop], width, nonzeros).dense()
        case Quantized(axis="rows"):
            return map_.select(torch.arange(start, stop, device=map_.device))
        case _:
            return map_.dense()[start:stop]
