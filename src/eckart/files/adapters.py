"""The folder of a saved adapter.

    eckart_adapter.json      {"format": 1, "name", "method", "settings", "seed", "trained": [module], "layers": {...}}
    adapter.safetensors      the numbers, each once

A layer is {"shape": [out, in], "sketch": [numbers], "changes": [...]}, the change nearest to the base first; what a
change says is in files/changes.py. Its tensors are "<layer>.<index of the change>.<name>". Modules that train whole are
stored as "<module>.<name in its state dict>".
The sketch tells whether an adapter meets the base it was made for, whatever dtype that is held in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eckart.atomic import aligned, appearing, check_output, read_json, write_json, write_tensors
from eckart.errors import EckartError
from eckart.files.changes import StoredChange, change_entry, read_change
from eckart.maps import LinearMap

SPEC, TENSORS = "eckart_adapter.json", "adapter.safetensors"
FORMAT = 1
SKETCH = 16
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """The changes of one layer.

    Attributes:
        shape: (out, in) of the base.
        sketch: what `sketch` returns of the base.
        changes: the one nearest to the base first.
    """

    shape: tuple[int, int]
    sketch: tuple[float, ...]
    changes: tuple[StoredChange, ...]


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter as it is on disk.

    Attributes:
        name: what it was called.
        method: the method that made it.
        settings: of the method.
        seed: of what was random in its start.
        layers: by name in the model.
        trained: state dicts of the modules that train whole, by name in the model.
    """

    name: str
    method: str
    settings: dict[str, Any]
    seed: int
    layers: dict[str, StoredLayer]
    trained: dict[str, dict[str, Tensor]]


def sketch(map_: LinearMap) -> tuple[float, ...]:
    """Return sixteen numbers u_i^T W v_i that move as little as W does, in relation to its size.

    Two matrices that have nothing to do with each other have sketches that have nothing to do with each other, while
    another dtype or a few bits per number change them by as much as W itself.
    """
    m, n = map_.shape
    with torch.no_grad():
        y = map_(_waves(n).to(map_.device, map_.dtype)).to("cpu", torch.float64)
    return tuple((_waves(m) * y).sum(1).tolist())


def _waves(size: int) -> Tensor:
    """Return fixed vectors (SKETCH, size) without a common direction: cos(i j^2), equidistributed since pi is none."""
    return torch.cos(torch.outer(torch.arange(1, SKETCH + 1), torch.arange(size).square()).double())


def write_adapter(folder: Path, adapter: StoredAdapter) -> None:
    """Write the folder of an adapter, whole or not at all.

    Raises:
        EckartError: if the folder holds something already or cannot be written.
    """
    check_output(folder)
    tensors = {f"{head}.{key}": t for head, state in adapter.trained.items() for key, t in state.items()}
    for name, layer in adapter.layers.items():
        for i, change in enumerate(layer.changes):
            tensors.update({f"{name}.{i}.{key}": t for key, t in change.all_tensors().items()})
    described = {
        "format": FORMAT,
        "name": adapter.name,
        "method": adapter.method,
        "settings": adapter.settings,
        "seed": adapter.seed,
        "trained": list(adapter.trained),
        "layers": {name: _layer_entry(layer) for name, layer in adapter.layers.items()},
    }
    with appearing(folder) as temporary:
        write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / SPEC, described)


def _layer_entry(layer: StoredLayer) -> dict[str, Any]:
    changes = [change_entry(change) for change in layer.changes]
    return {"shape": list(layer.shape), "sketch": list(layer.sketch), "changes": changes}


def read_adapter(folder: Path) -> StoredAdapter:
    """Read the folder of an adapter, every spec checked against every tensor.

    Raises:
        EckartError: if a file is missing or damaged, or of a later format.
    """
    raw = read_json(folder / SPEC)
    if raw.get("format") != FORMAT:
        raise EckartError(
            f"{folder} has the format {raw.get('format')!r}, and this version of eckart reads {FORMAT}; update eckart"
        )
    tensors = read_tensors(folder / TENSORS)
    try:
        layers = {name: _layer(name, entry, tensors) for name, entry in raw["layers"].items()}
        trained = {head: _taken(f"{head}.", tensors) for head in raw["trained"]}
        if not layers:
            raise EckartError("it adapts no layer")
        name, method, settings, seed = str(raw["name"]), str(raw["method"]), dict(raw["settings"]), int(raw["seed"])
    except (EckartError, *DAMAGED) as error:
        raise EckartError(f"{folder} is damaged ({error}); copy the folder again") from error
    if tensors:
        raise EckartError(f"{folder / TENSORS} holds {min(tensors)}, which {SPEC} does not mention; copy it again")
    return StoredAdapter(name, method, settings, seed, layers, trained)


def _layer(name: str, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> StoredLayer:
    m, n = entry["shape"]
    found = tuple(float(number) for number in entry["sketch"])
    if len(found) != SKETCH:
        raise EckartError(f"{name} has a sketch of {len(found)} numbers, not {SKETCH}")
    changes = tuple(read_change(f"{name}.{i}.", c, (m, n), tensors) for i, c in enumerate(entry["changes"]))
    return StoredLayer((m, n), found, changes)


def _taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors whose names begin like this out of those of a file; return them by the rest of their names."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        EckartError: if it is missing or damaged.
    """
    try:
        return {name: aligned(tensor) for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise EckartError(f"{path} cannot be read ({error}); copy the folder again") from error
