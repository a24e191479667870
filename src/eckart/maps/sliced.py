"""Some rows and columns of a map, as a map: what is left of a product when channels are left out on either side."""

from torch import Tensor

from eckart.maps.base import LinearMap, Product, Scaled, Sum
from eckart.maps.dense import Dense
from eckart.maps.lowrank import LowRank
from eckart.maps.quantized import Quantized
from eckart.maps.selection import Placement, Selection


def sliced(map_: LinearMap, rows: Tensor | None = None, columns: Tensor | None = None) -> LinearMap:
    """Return W[rows][:, columns] as a map, without what is left out wherever the structure allows it.

    Codes are decoded in the rows asked for only. A structure without a rule of its own is applied whole, between a
    selection and a placement: exact, but no cheaper.

    Args:
        map_: W (m, n).
        rows: outputs to keep, (k,) int32 or int64, ascending; None for all.
        columns: inputs to keep, the same.
    """
    if rows is None and columns is None:
        return map_
    match map_:
        case Dense(weight):
            return Dense(_taken(_taken(weight, 0, rows), 1, columns))
        case LowRank(up, down):
            return LowRank(_taken(up, 0, rows), _taken(down, 1, columns))
        case Scaled(inner, scale):
            return Scaled(sliced(inner, rows, columns), scale)
        case Sum(maps):
            return Sum(tuple(sliced(one, rows, columns) for one in maps))
        case Product((one,)):
            return sliced(one, rows, columns)
        case Product((first, *inner, last)):
            return Product((sliced(first, rows), *inner, sliced(last, None, columns)))
        case Quantized(axis="rows") if rows is not None:
            return sliced(Dense(map_.select(rows)), None, columns)
    before = () if columns is None else (Placement(columns, map_.shape[1]),)
    behind = () if rows is None else (Selection(rows, map_.shape[0]),)
    return Product((*behind, map_, *before))


def _taken(matrix: Tensor, axis: int, places: Tensor | None) -> Tensor:
    return matrix if places is None else matrix.index_select(axis, places)
