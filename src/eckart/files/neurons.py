"""Fewer hidden units in a compressed folder: layers of fewer rows, and one of fewer columns behind them.

They are dense or codes.

Their entries in config.json have the maps of the narrow matrices, and say what those stand for:

    "neurons": {"group": "<name of the layer behind the units>", "side": "rows" | "columns", "of": <units before>}
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from eckart.errors import EckartError

ROWS, COLUMNS = "rows", "columns"


def neurons_entry(group: str, side: str, of: int) -> dict[str, Any]:
    """Return what an entry says of its hidden units.

    Args:
        group: name of the layer behind the units, the same for all layers of the group.
        side: "rows" for a layer that writes the units, "columns" for the one that reads them.
        of: units in the dense model.
    """
    return {"group": group, "side": side, "of": of}


def full_shape(entry: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the dense layer that an entry with a map of some shape stands for."""
    stated = entry.get("neurons")
    if stated is None:
        return shape
    return (stated["of"], shape[1]) if stated["side"] == ROWS else (shape[0], stated["of"])


def padded(entry: Mapping[str, Any], weight: Tensor) -> Tensor:
    """Return a weight (or bias) with zeros in place of the hidden units that were removed: the same function."""
    stated = entry.get("neurons")
    if stated is None or (weight.ndim == 1 and stated["side"] == COLUMNS):
        return weight
    shape = (stated["of"],) if weight.ndim == 1 else full_shape(entry, (weight.shape[0], weight.shape[1]))
    out = weight.new_zeros(shape)
    out[tuple(slice(size) for size in weight.shape)] = weight
    return out


def _matrix_shape(spec: Mapping[str, Any]) -> list[int] | None:
    """Return the shape of a dense matrix, or one of codes, as its spec states it; None of another spec."""
    if spec.get("op") == "Dense":
        return spec.get("weight")
    match spec.get("op"), spec.get("codes"), spec.get("width"):
        case "Quantized", {"shape": [int() as rows, _]}, int() as width:
            return [rows, width] if spec.get("axis") == "rows" else [width, rows]
    return None


def check_neurons(layers: Mapping[str, Any]) -> None:
    """Check that all layers around a set of hidden units have the same number of them.

    Raises:
        EckartError: if they do not; the group is named.
    """
    groups: dict[str, list[tuple[str, int, int]]] = {}
    for name, entry in layers.items():
        stated = entry.get("neurons")
        if stated is None:
            continue
        shape = _matrix_shape(entry["map"])
        fits = (
            isinstance(stated, Mapping) and isinstance(stated.get("of"), int) and stated.get("side") in (ROWS, COLUMNS)
        )
        if not fits or not isinstance(shape, list) or len(shape) != 2:
            raise EckartError(f"the spec of layer {name!r} is invalid: it does not say which hidden units it has")
        count = shape[0 if stated["side"] == ROWS else 1]
        groups.setdefault(str(stated.get("group")), []).append((stated["side"], count, stated["of"]))
    for group, members in groups.items():
        sides = [side for side, _, _ in members]
        if len({(count, of) for _, count, of in members}) > 1 or sides.count(COLUMNS) != 1 or ROWS not in sides:
            raise EckartError(f"the layers around the hidden units of {group!r} do not have the same number of them")
