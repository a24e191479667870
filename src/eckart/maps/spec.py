"""From a spec and named tensors back to a map: the reading half of a checkpoint; `LinearMap.spec` writes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.maps.base import LinearMap, require, require_shape

# Finds or makes the tensor of a name, shape and dtype (None: any floating dtype).
_Lookup = Callable[[str, tuple[int, ...], torch.dtype | None], Tensor]


def from_spec(
    spec: Mapping[str, Any], tensors: Mapping[str, Tensor], families: Mapping[str, type[LinearMap]]
) -> LinearMap:
    """Rebuild a map from its spec and its tensors; nothing is copied.

    Args:
        spec: what `LinearMap.spec` returned.
        tensors: tensors by the names `LinearMap.tensors` gave them, of the shapes the spec states.
        families: map classes by name (`eckart.maps.FAMILIES`, plus your own).

    Raises:
        EckartError: if a class is unknown, a tensor is missing or left over, or a shape differs from the spec.
    """
    unused = set(tensors)

    def lookup(name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        tensor = tensors.get(name)
        if tensor is None:
            raise EckartError(f"from_spec: no tensor {name!r}, needed one of shape {shape}")
        require_shape(f"tensor {name!r}", tensor, *shape)
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        require(fits, f"tensor {name!r}", f"dtype {tensor.dtype}", str(dtype or "a floating dtype"))
        unused.discard(name)
        return tensor

    out = _build(spec, families, lookup, "")
    require(not unused, f"from_spec of {spec['op']}", f"tensors {sorted(unused)} beside its own", "no others")
    return out


def blank(spec: Mapping[str, Any], families: Mapping[str, type[LinearMap]], dtype: torch.dtype) -> LinearMap:
    """Build the map a spec describes on the meta device: shapes are checked and nothing is allocated."""

    def lookup(name: str, shape: tuple[int, ...], kind: torch.dtype | None) -> Tensor:
        return torch.empty(shape, dtype=kind or dtype, device="meta")

    return _build(spec, families, lookup, "")


def _build(spec: Mapping[str, Any], families: Mapping[str, type[LinearMap]], lookup: _Lookup, prefix: str) -> LinearMap:
    op = spec.get("op")
    cls = families.get(str(op))
    if cls is None:
        raise EckartError(f"from_spec: unknown map {op!r}; known are {', '.join(sorted(families))}")
    fields = {f.name for f in dataclasses.fields(cast(Any, cls))}
    given = set(spec) - {"op"}
    require(given == fields, f"spec of {op}", f"fields {sorted(given)}", f"{sorted(fields)}")
    values = {key: _field_value(key, spec[key], families, lookup, prefix, top=True) for key in given}
    return cls(**values)


def _field_value(
    name: str, value: Any, families: Mapping[str, type[LinearMap]], lookup: _Lookup, prefix: str, top: bool
) -> Any:
    """Turn one entry of a spec into a field: a map, a tensor, a tuple of maps (named by index), or a plain value."""
    if isinstance(value, Mapping) and "op" in value:
        return _build(value, families, lookup, f"{prefix}{name}.")
    if isinstance(value, Mapping) and set(value) == {"tuple"}:
        return tuple(_field_value(name, item, families, lookup, prefix, top=False) for item in value["tuple"])
    if isinstance(value, Mapping):
        dtype = getattr(torch, str(value.get("dtype")), None)
        fits = isinstance(dtype, torch.dtype) and _is_shape(value.get("shape"))
        require(fits, f"spec of tensor {prefix}{name}", f"{dict(value)}", "a shape and a torch dtype")
        return lookup(f"{prefix}{name}", tuple(value["shape"]), cast(torch.dtype, dtype))
    if _is_shape(value):
        return lookup(f"{prefix}{name}", tuple(value), None)
    if isinstance(value, (list, tuple)):
        names = (str(i) if top else f"{name}.{i}" for i in range(len(value)))
        inner = zip(names, value, strict=True)
        return tuple(_field_value(key, item, families, lookup, prefix, top=False) for key, item in inner)
    return value


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
