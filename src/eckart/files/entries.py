"""The format of compressed folders: what config.json says of them, checked against their files.

A compressed model is a normal Hugging Face folder. Its config.json holds

    "quantization_config": {
      "quant_method": "eckart",
      "format": 1,
      "layers": {
        "<module name>": {"kind": "linear",    "map": <spec>, "bias": true | false},
        "<module name>": {"kind": "embedding", "map": <spec>, "padding_idx": null | int},
        "<module name>": {"kind": "tied-head", "embedding": "<module name>"}
      },                  (layers with fewer hidden units say so: eckart.files.neurons)
      "sentinel": "<module name>.weight",
      "made_by": {...}
    }

<spec> is `LinearMap.spec()`: class, tensor shapes, plain fields. The safetensors hold the state dict of the model with
these modules replaced by hosts: "<name>.down.weight" and "<name>.up.weight" for a low-rank map, "<name>.basis.weight",
"<name>.coefficients.weight" and "<name>.order" for a pivoted one, "<name>.table.weight" and "<name>.rest.weight" for an
embedding; see `eckart.hosts`. A linear layer may take tensors from another one ("shared" in its entry, see
`eckart.files.sharing`). Everything else is as in the original folder, in its original dtype.

The sentinel is one more tensor with no elements, named like the dense weight of a compressed layer: without eckart,
transformers warns about an unknown quant_method and would go on with random weights; with the sentinel it finds a
weight of the wrong shape and stops.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.errors import EckartError
from eckart.files.neurons import check_neurons
from eckart.files.sharing import check_names, check_sharing, stored_name
from eckart.hosts import embedding_host, host
from eckart.maps import FAMILIES, LinearMap, blank

QUANT_METHOD = "eckart"
FORMAT = 1
KINDS = LINEAR, EMBEDDING, TIED_HEAD = "linear", "embedding", "tied-head"


class EckartConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a compressed model; see the module's docstring.

    Args:
        layers: entries by module name.
        format: version of the format.
        sentinel: name of the sentinel tensor; chosen from the layers if not given.
        tied: whether the dense model tied its head to its embedding.
        made_by: method, settings and figures of the run that made it; not read.
        **rest: keys of later formats, kept.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        format: int = FORMAT,
        sentinel: str | None = None,
        tied: bool = False,
        made_by: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        if format > FORMAT:
            raise EckartError(
                f"this folder has format {format}, but this version of eckart reads {FORMAT}; update eckart"
            )
        self.quant_method = QUANT_METHOD
        self.format = format
        self.layers = check_entries(layers or {})
        self.sentinel = sentinel or sentinel_name(self.layers)
        self.tied = tied
        self.made_by = dict(made_by or {})
        rest.pop("quant_method", None)
        self.__dict__.update(rest)


def check_entries(layers: Any) -> dict[str, Any]:
    """Return the entries of a config as they are.

    Raises:
        EckartError: if they are not entries of a kind this version knows.
    """
    if not isinstance(layers, Mapping):
        raise EckartError(f"layers must be entries by module name, got a {type(layers).__name__}")
    for name, entry in layers.items():
        kind = entry.get("kind") if isinstance(entry, Mapping) else None
        needed = {LINEAR: ("map", "bias"), EMBEDDING: ("map",), TIED_HEAD: ("embedding",)}.get(str(kind))
        if needed is None:
            raise EckartError(f"layer {name!r} is of kind {kind!r}; this version of eckart reads {', '.join(KINDS)}")
        lacking = [key for key in needed if key not in entry]
        if lacking:
            raise EckartError(f"the spec of layer {name!r} is invalid: it has no {lacking[0]!r}")
        check_names(name, entry)
    check_neurons(layers)
    return dict(layers)


def sentinel_name(layers: Mapping[str, Any]) -> str | None:
    """Return the sentinel's name: config.json sorts its keys, so the smallest linear layer, never the first.

    Dense layers with fewer hidden units need none: they hold a weight of the wrong shape.
    """
    narrow = {name for name, entry in layers.items() if "neurons" in entry and entry["map"].get("op") == "Dense"}
    linear = [name for name, entry in layers.items() if entry["kind"] == LINEAR and name not in narrow]
    names = linear or [name for name, entry in layers.items() if entry["kind"] == EMBEDDING]
    return f"{min(names)}.weight" if names else None


def blank_map(name: str, entry: Mapping[str, Any], dtype: torch.dtype) -> LinearMap:
    """Return the map of an entry on the meta device.

    Raises:
        EckartError: if the entry is not a valid spec; the layer is named.
    """
    try:
        return blank(entry["map"], FAMILIES, dtype)
    except (EckartError, KeyError, TypeError, IndexError) as error:
        raise EckartError(f"the spec of layer {name!r} is invalid: {error}") from error


def blank_module(name: str, entry: Mapping[str, Any]) -> nn.Module:
    """Return the host of a compressed layer on the meta device, in float32.

    Raises:
        EckartError: if the entry is not a valid spec; the layer is named.
    """
    map_ = blank_map(name, entry, torch.float32)
    if entry["kind"] == EMBEDDING:
        return embedding_host(map_, entry.get("padding_idx"))
    return host(map_, torch.empty(map_.shape[0], device="meta") if entry["bias"] else None)


def expected_tensors(layers: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that the compressed layers of a folder must have, by full name.

    Raises:
        EckartError: if a spec is invalid, or a layer takes a tensor from one that does not have it.
    """
    shapes = {
        name: {key: tuple(tensor.shape) for key, tensor in blank_module(name, entry).state_dict().items()}
        for name, entry in layers.items()
        if entry["kind"] != TIED_HEAD
    }
    check_sharing(layers, shapes)
    return {stored_name(name, layers[name], key): shape for name, own in shapes.items() for key, shape in own.items()}


def check_files(files: Iterable[str] | str | None, layers: Mapping[str, Any]) -> None:
    """Check the headers of safetensors files against the specs, before anything is allocated.

    Raises:
        EckartError: if a tensor is missing or has another shape than its spec says.
    """
    if not files:
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for file in [files] if isinstance(files, str) else files:
        with safe_open(file, "pt") as handle:
            shapes.update({name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()})  # noqa: SIM118
    folder = Path(file).parent
    for name, shape in expected_tensors(layers).items():
        if name not in shapes:
            raise EckartError(f"{folder} lacks the tensor {name} that its config describes; the folder is incomplete")
        if shapes[name] != shape:
            raise EckartError(f"tensor {name} in {folder} has shape {shapes[name]}, but its spec says {shape}")
