"""Tensors that several layers of a compressed folder share: stored once, under the name of the layer that owns them.

A layer's entry in config.json says which of its tensors are another layer's, by their names inside the host:

    "<module name>": {"kind": "linear", "map": <spec>, "bias": false, "shared": {"down.weight": "<owner's name>"}}

The owner has a tensor of the same name and shape, and owns it. After loading both hosts hold one parameter.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts import map_of
from eckart.maps import LinearMap

SHARED = "shared"


def stored_name(name: str, entry: Mapping[str, Any], key: str) -> str:
    """Return the full name under which the tensor `key` of a layer is stored: its own, or its owner's."""
    return f"{entry.get(SHARED, {}).get(key, name)}.{key}"


def borrowed(layers: Mapping[str, Any]) -> dict[str, str]:
    """Return the full name of the owner's tensor by that of every tensor a layer takes from another."""
    return {
        f"{name}.{key}": stored_name(name, entry, key)
        for name, entry in layers.items()
        for key in entry.get(SHARED, {})
    }


def borrowed_maps(module: nn.Module, keys: Iterable[str]) -> list[LinearMap]:
    """Return the factors of a layer's host that consist of tensors it takes from another layer."""
    return [map_of(module.get_submodule(part)) for part in dict.fromkeys(key.rpartition(".")[0] for key in keys)]


def _held(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its full name."""
    module, _, last = name.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(module), last))


def check_names(name: str, entry: Mapping[str, Any]) -> None:
    """Raise an `EckartError` unless what a layer shares is stated as names by names."""
    taken = entry.get(SHARED, {})
    if not isinstance(taken, Mapping) or not all(isinstance(owner, str) for owner in taken.values()):
        raise EckartError(f"the spec of layer {name!r} is invalid: {SHARED!r} must be layers by tensor, got {taken!r}")


def renamed(entry: Mapping[str, Any], local: Callable[[str], str | None]) -> dict[str, Any]:
    """Return an entry with the names of owners replaced.

    Raises:
        EckartError: if an owner has no name there.
    """
    out = dict(entry)
    if SHARED in entry:
        out[SHARED] = {key: local(owner) for key, owner in entry[SHARED].items()}
        lost = [entry[SHARED][key] for key, owner in out[SHARED].items() if owner is None]
        if lost:
            raise EckartError(f"a tensor is shared with the layer {lost[0]!r}, which this model does not have")
    return out


def check_sharing(layers: Mapping[str, Any], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Check that whatever a layer takes from another is there.

    Args:
        layers: entries by module name.
        shapes: for every layer, the shape of each tensor of its host.

    Raises:
        EckartError: if an owner is missing, does not own the tensor itself, or has it in another shape.
    """
    for name, entry in layers.items():
        for key, owner in entry.get(SHARED, {}).items():
            needed = shapes.get(name, {}).get(key)
            if needed is None:
                raise EckartError(f"the spec of layer {name!r} is invalid: it has no tensor {key!r} to share")
            found = shapes.get(owner, {}).get(key)
            if found is None or key in layers[owner].get(SHARED, {}):
                raise EckartError(f"layer {name!r} takes {key!r} from {owner!r}, which does not own such a tensor")
            if found != needed:
                raise EckartError(f"layer {name!r} takes {key!r} of shape {needed} from {owner!r}, where it is {found}")


def tie(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Let every layer hold its owner's parameters and codes instead of equal ones of its own."""
    for name, owner in borrowed(layers).items():
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, _held(model, owner))


def without_borrowed(model: nn.Module, state: dict[str, Tensor], layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a state dict without the tensors that other layers own.

    Raises:
        EckartError: if one of them is no longer its owner's, so that leaving it out would lose it.
    """
    taken = borrowed(layers)
    for name, owner in taken.items():
        own, source = _held(model, name), _held(model, owner)
        # moved to another device, codes are equal but no longer one tensor
        if own is not source and (isinstance(own, nn.Parameter) or not own.equal(source)):
            raise EckartError(
                f"{name} was shared with {owner} and is not any more; dequantize the model before saving it"
            )
    return {name: tensor for name, tensor in state.items() if name not in taken}


def tied_keys(model: nn.Module, layers: Mapping[str, Any], *, tied: bool) -> None:
    """Tell transformers which parameters are tied, target by source, or that they no longer are."""
    keys = cast(dict[str, str], getattr(model, "all_tied_weights_keys", {}))
    taken = borrowed(layers)
    kept = {name: source for name, source in keys.items() if name not in taken}
    parameters = {name: owner for name, owner in taken.items() if isinstance(_held(model, name), nn.Parameter)}
    model.all_tied_weights_keys = {**kept, **(parameters if tied else {})}  # type: ignore[assignment]


def unlist_codes(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Leave codes that a layer takes from another out of its state dict: transformers ties parameters alone."""
    for name in borrowed(layers):
        module, _, last = name.rpartition(".")
        if not isinstance(_held(model, name), nn.Parameter):
            model.get_submodule(module)._non_persistent_buffers_set.add(last)
