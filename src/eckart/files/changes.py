"""One change of an adapted layer as it is on disk: a kind, and the maps, tensors and numbers that the kind is made of.

    {"change": kind, "map": <spec>, "tensors": {name: shape}, "numbers": {name: number}, "support": digest,
     "scale": s, "dropout": p, "frozen": [parameter]}

    plus         W + s D                          the map D
    times        W R                              the map R
    left         L W                              the map L
    rescaled     diag(g / |rows of W|) W          the diagonal matrix of the row lengths g
    multiplied   W + s W * D                      the map D
    grouped      W + s W * (b_i a_p(i)j)          of_columns a, of_rows b                      (SPP)
    masked       W + s M * (U V)                  up U, down V, elastic, M                     (LoRS, SQFT)
    kernel       W + the large entries of K       inputs, outputs, density                     (SNELLA)
    routed       W x + s U h_K, h = V x           the map V, up U, bias d, kept, balance       (FlyLoRA)

M is where the base is not 0. It is found there again when the adapter is loaded, and "support" is the digest of its
bits, which tells another support from the one trained on. Where the base's own is not the adapter's any more, such as
after weights were changed in place, the bits are stored instead, "bits", an eighth of a byte for an entry.

Every size is checked against the layer's (m, n) and against the other sizes that have the same letter in `KINDS`.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.maps import FAMILIES, Diagonal, LinearMap, blank, from_spec

PLUS, TIMES, LEFT, RESCALED = "plus", "times", "left", "rescaled"
MULTIPLIED, GROUPED, MASKED, KERNEL, ROUTED = "multiplied", "grouped", "masked", "kernel", "routed"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of change is made of; sizes are letters: those of the layer m and n, others any size.

    Attributes:
        map: sizes of its map, or "" if it has none.
        tensors: sizes of its floating tensors.
        numbers: names of its numbers.
    """

    map: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()


KINDS = {
    PLUS: Kind("m n"),
    TIMES: Kind("n n"),
    LEFT: Kind("m m"),
    RESCALED: Kind("m m"),
    MULTIPLIED: Kind("m n"),
    GROUPED: Kind(tensors={"of_columns": "r n", "of_rows": "m"}),
    MASKED: Kind(tensors={"up": "m r", "down": "r n"}, numbers=("elastic",)),
    KERNEL: Kind(tensors={"inputs": "2 n h", "outputs": "2 m h"}, numbers=("density",)),
    ROUTED: Kind("r n", {"up": "m r", "bias": "r"}, ("kept", "balance")),
}


@dataclass(frozen=True, slots=True)
class StoredChange:
    """One change of a layer.

    Attributes:
        kind: one of `KINDS`.
        map: the kind's map, if it has one.
        scale: factor of what is added.
        dropout: share of the inputs of what is added that is dropped in training.
        frozen: parameters of the change's module that never train.
        tensors: the kind's tensors by name; the bits of a mask (m, ceil(n / 8)) uint8 as "bits".
        numbers: the kind's numbers by name.
        support: digest of the base's support, of masks that are found there.
    """

    kind: str
    map: LinearMap | None = None
    scale: float = 1.0
    dropout: float = 0.0
    frozen: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    support: str = ""

    def all_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the map and of the kind, by the names they have in the file."""
        return {**(self.map.tensors() if self.map is not None else {}), **self.tensors}


def digest_of(bits: Tensor) -> str:
    """Return a short name of a support from its bits, (m, bytes) uint8."""
    return hashlib.sha256(bits.cpu().contiguous().numpy().tobytes()).hexdigest()[:32]


def change_entry(change: StoredChange) -> dict[str, Any]:
    """Return what the description says of a change."""
    entry: dict[str, Any] = {"change": change.kind}
    if change.map is not None:
        entry["map"] = change.map.spec()
    if change.tensors:
        entry["tensors"] = {name: list(tensor.shape) for name, tensor in change.tensors.items()}
    if change.numbers:
        entry["numbers"] = dict(change.numbers)
    if change.support:
        entry["support"] = change.support
    return {**entry, "scale": change.scale, "dropout": change.dropout, "frozen": list(change.frozen)}


def read_change(
    prefix: str, entry: Mapping[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]
) -> StoredChange:
    """Return a change, whose tensors are taken out of those of the file.

    Args:
        prefix: of its tensors' names.
        entry: what the description says of it.
        shape: (m, n) of the layer.
        tensors: all that are left.

    Raises:
        EckartError: if it is of no known kind, or anything does not fit.
    """
    name, found = prefix[:-1], str(entry["change"])
    kind = KINDS.get(found)
    if kind is None:
        raise EckartError(f"{name} is a change of kind {found!r}; this version knows {', '.join(KINDS)}")
    sizes = {"m": shape[0], "n": shape[1]}
    map_ = _read_map(prefix, entry, kind, sizes, tensors)
    held = _read_tensors(prefix, dict(entry.get("tensors", {})), found, sizes, tensors)
    support = str(entry.get("support", ""))
    if (found == MASKED) != (bool(support) != ("bits" in held)):
        raise EckartError(f"{name} must say either the digest of the base's support or bits, and only if it is masked")
    numbers = {key: float(value) for key, value in entry.get("numbers", {}).items()}
    _check_numbers(name, numbers, kind, sizes)
    if found == RESCALED and not isinstance(map_, Diagonal):
        raise EckartError(f"{name} is a {map_!r} where a diagonal matrix belongs")
    scale, dropout = float(entry["scale"]), float(entry["dropout"])
    if not math.isfinite(scale) or not 0 <= dropout < 1 or (dropout and found != PLUS):
        raise EckartError(f"{name} has scale {scale} and dropout {dropout}")
    return StoredChange(found, map_, scale, dropout, tuple(str(key) for key in entry["frozen"]), held, numbers, support)


def _read_map(
    prefix: str, entry: Mapping[str, Any], kind: Kind, sizes: dict[str, int], tensors: dict[str, Tensor]
) -> LinearMap | None:
    """Return the map of a change, checked, its tensors taken out of those of the file."""
    if bool(kind.map) != ("map" in entry):
        raise EckartError(f"{prefix[:-1]} {'lacks its map' if kind.map else 'has a map, which its kind has not'}")
    if not kind.map:
        return None
    spec = entry["map"]
    names = blank(spec, FAMILIES, torch.float32).tensors()
    map_ = from_spec(spec, {key: _taken(prefix, key, tensors) for key in names}, FAMILIES)
    map_.validate()
    _check_sizes(f"{prefix[:-1]} is a {map_!r} where a map", map_.shape, kind.map, sizes)
    return map_


def _read_tensors(
    prefix: str, given: Mapping[str, Any], kind: str, sizes: dict[str, int], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a change, checked, taken out of those of the file."""
    needed = dict(KINDS[kind].tensors)
    if kind == MASKED and "bits" in given:
        needed, sizes["b"] = {**needed, "bits": "m b"}, -(-sizes["n"] // 8)
    if given.keys() != needed.keys():
        raise EckartError(f"{prefix[:-1]} has the tensors {sorted(given)} where {sorted(needed)} belong")
    out = {key: _taken(prefix, key, tensors) for key in needed}
    for key, tensor in out.items():
        if list(tensor.shape) != list(given[key]):
            raise EckartError(f"the tensor {prefix}{key} is {tuple(tensor.shape)}, described as {given[key]}")
        _check_sizes(
            f"{prefix}{key} is a tensor {tuple(tensor.shape)} where one", tuple(tensor.shape), needed[key], sizes
        )
        if tensor.dtype != torch.uint8 if key == "bits" else not tensor.is_floating_point():
            raise EckartError(f"the tensor {prefix}{key} has the dtype {tensor.dtype}")
    return out


def _check_sizes(what: str, shape: tuple[int, ...], letters: str, sizes: dict[str, int]) -> None:
    """Raise an `EckartError` unless a shape has the sizes of its letters; a letter seen first gets its size."""
    names = letters.split()
    if len(names) == len(shape):
        for letter, size in zip(names, shape, strict=True):
            sizes.setdefault(letter, int(letter) if letter.isdigit() else size)
    needed = tuple(sizes.get(letter, letter) for letter in names)
    if tuple(shape) != needed:
        raise EckartError(f"{what} of shape {needed} belongs")


def _check_numbers(name: str, numbers: Mapping[str, float], kind: Kind, sizes: Mapping[str, int]) -> None:
    """Raise an `EckartError` unless the numbers of a change are those of its kind and can be."""
    if numbers.keys() != set(kind.numbers):
        raise EckartError(f"{name} has the numbers {sorted(numbers)} where {sorted(kind.numbers)} belong")
    possible: dict[str, Callable[[float], bool]] = {
        "elastic": lambda value: value in (0.0, 1.0),
        "density": lambda value: 0 < value <= 1,
        "kept": lambda value: value in range(1, sizes["r"] + 1),
        "balance": lambda value: 0 <= value < math.inf,
    }
    wrong = next((key for key, value in numbers.items() if not possible[key](value)), None)
    if wrong is not None:
        raise EckartError(f"{name} has {wrong} {numbers[wrong]}, which cannot be")


def _taken(prefix: str, key: str, tensors: dict[str, Tensor]) -> Tensor:
    if f"{prefix}{key}" not in tensors:
        raise EckartError(f"the tensor {prefix}{key} is missing")
    return tensors.pop(f"{prefix}{key}")
