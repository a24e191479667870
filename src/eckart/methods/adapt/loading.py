"""Loading a saved adapter, from eckart's own folder or from one that PEFT wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.files.adapters import SPEC, StoredLayer, read_adapter, sketch
from eckart.files.peft import CONFIG, PeftAdapter, read_peft
from eckart.hosts import AdaptedHost, Adapter, adaptable_layers, map_of, offset_of
from eckart.hosts.adapter import Change, Left, Plus, Rescaled, Times
from eckart.hosts.entrywise import Multiplied
from eckart.maps import LinearMap
from eckart.methods.adapt.adapt import attach, check_name, follow
from eckart.methods.adapt.adapters import ATTRIBUTE, State
from eckart.methods.adapt.changes import made_change
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.peft_layers import described_peft, from_peft

# Share by which the sketches of a base may differ: codes of 4 bits move them by 0.09, of 2 bits by 0.35, the best
# map of a quarter of the ranks by 0.63, the weights of another model by 1.4.
TOLERANCE = 0.75

# State dicts of modules that train whole, by name.
States = Mapping[str, Mapping[str, Tensor]]


def load_adapter(model: nn.Module, folder: str | Path, name: str | None = None) -> nn.Module:
    """Put a saved adapter on a model, active and ready to train or merge, and return the same model.

    Args:
        model: the base it was made for, or that base in another dtype; other adapters may be on it.
        folder: what `eckart.adapters(model).save` wrote, or PEFT.
        name: what it is called from now on; by default as it was when saved ("default" for one of PEFT's).

    Raises:
        EckartError: for a folder that is damaged or cannot be expressed, a base that does not fit, or a name that is
            taken; the model is as it was then.
    """
    folder = Path(folder)
    saved = _own(model, folder) if is_own(folder) else _from_peft(model, folder)
    recipe, chosen = saved.described.recipe(), saved.name if name is None else name
    check_name(model, chosen)
    _check_trained(model, saved.trained)
    built = {layer: Adapter(changes) for layer, changes in saved.layers.items()}
    follow(model, built, recipe, saved.described.seed)
    attach(model, chosen, saved.described, built)  # remembers what the heads held
    for head, state in saved.trained.items():
        model.get_submodule(head).load_state_dict(dict(state))
    return model


def is_own(folder: Path) -> bool:
    """Tell whether an adapter's folder is eckart's own, or PEFT's.

    Raises:
        EckartError: if it is neither.
    """
    if (folder / SPEC).is_file():
        return True
    if (folder / CONFIG).is_file():
        return False
    raise EckartError(f"{folder} holds no adapter: neither {SPEC} nor PEFT's {CONFIG} is there")


@dataclass(frozen=True, slots=True)
class _Saved:
    """What a folder holds, checked against the layers of a model."""

    name: str
    described: Described
    layers: dict[str, list[Change]]
    trained: States


def _own(model: nn.Module, folder: Path) -> _Saved:
    stored = read_adapter(folder)
    bases = _bases(model, stored.layers, folder)
    for layer, entry in stored.layers.items():
        _check_shape(layer, entry.shape, bases[layer].shape, bases[layer].shape)
    _check_sketches(stored.layers, bases)
    layers = {n: [made_change(n, change, bases[n]) for change in e.changes] for n, e in stored.layers.items()}
    described = Described(stored.method, stored.settings, stored.seed, tuple(stored.trained))
    return _Saved(stored.name, described, layers, stored.trained)


def _from_peft(model: nn.Module, folder: Path) -> _Saved:
    peft = read_peft(folder)
    bases = _bases(model, peft.layers, folder)
    layers = {
        layer: from_peft(peft, layer, base.shape, biased=offset_of(model.get_submodule(layer)) is not None)
        for layer, base in bases.items()
    }
    _check_shapes(layers, bases)
    trained = _by_module(model, peft)
    return _Saved("default", described_peft(peft, tuple(trained)), layers, trained)


def _bases(model: nn.Module, layers: Mapping[str, object], folder: Path) -> dict[str, LinearMap]:
    """Return the maps of the layers that an adapter goes on, by name."""
    found = adaptable_layers(model)
    lacking = next((layer for layer in layers if layer not in found), None)
    if lacking is not None:
        raise EckartError(f"{folder} adapts {lacking}, where this model has no linear layer; load it on its own base")
    modules = {layer: found[layer] for layer in layers}
    return {name: map_of(m.base if isinstance(m, AdaptedHost) else m) for name, m in modules.items()}


def _check_shapes(layers: Mapping[str, list[Change]], bases: Mapping[str, LinearMap]) -> None:
    """Refuse an adapter that was made for layers of other shapes."""
    for layer, change in ((layer, change) for layer, changes in layers.items() for change in changes):
        m, n = bases[layer].shape
        match change:
            case Plus():
                _check_shape(layer, map_of(change.delta).shape, (m, n), (m, n))
            case Times():
                _check_shape(layer, map_of(change.right).shape, (n, n), (m, n))
            case Left():
                _check_shape(layer, map_of(change.left).shape, (m, m), (m, n))
            case Multiplied():
                _check_shape(layer, change.shape, (m, n), (m, n))
            case Rescaled():
                _check_shape(layer, tuple(change.magnitude.shape), (m,), (m, n))


def _check_shape(layer: str, came: tuple[int, ...], needed: tuple[int, ...], shape: tuple[int, int]) -> None:
    if came != needed:
        m, n = shape
        raise EckartError(
            f"the adapter of {layer} is {came} where the layer, {m} x {n}, needs {needed}; load it on its own base"
        )


def _check_sketches(layers: Mapping[str, StoredLayer], bases: Mapping[str, LinearMap]) -> None:
    """Refuse a base whose weights have nothing to do with those that an adapter was made for."""
    moved = size = 0.0
    for name, layer in layers.items():
        saved, found = (torch.tensor(values, dtype=torch.float64) for values in (layer.sketch, sketch(bases[name])))
        scale = saved.square().sum().clamp_min(1e-30)  # every layer counts alike
        moved += float((found - saved).square().sum() / scale)
        size += 1.0
    if not (moved / size) ** 0.5 <= TOLERANCE:
        raise EckartError(
            f"this adapter was made for another base: the weights of its layers differ by {(moved / size) ** 0.5:.0%} "
            "from those it started from; load it on its own base"
        )


def _by_module(model: nn.Module, peft: PeftAdapter) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the modules that train whole, by module and name in its state dict."""
    heads = [name for name, _ in model.named_modules() if any(_ends(name, end) for end in peft.modules)]
    out: dict[str, dict[str, Tensor]] = {}
    for full, tensor in peft.trained.items():
        head = next((head for head in heads if full.startswith(f"{head}.")), None)
        if head is not None:
            out.setdefault(head, {})[full.removeprefix(f"{head}.")] = tensor
        elif not _is_of_base(model, full, tensor):
            raise EckartError(
                f"the tensor {full} is part of no linear layer's adapter, of no module of modules_to_save"
            )
    return out


def _is_of_base(model: nn.Module, full: str, tensor: Tensor) -> bool:
    """Tell whether a tensor is the base's own, which PEFT saves along where a head is adapted."""
    held = model.state_dict()
    names = (full, full.replace(".base_layer.", "."), full.replace(".base_layer.", ".base."))
    own = next((held[name] for name in names if name in held), None)
    return own is not None and torch.equal(own.to("cpu", tensor.dtype), tensor)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _check_trained(model: nn.Module, trained: States) -> None:
    """Refuse modules that the model does not have, or that another adapter trains."""
    state: State | None = getattr(model, ATTRIBUTE, None)
    modules = dict(model.named_modules())
    for head, tensors in trained.items():
        if head not in modules:
            raise EckartError(f"the adapter trains {head}, which this model does not have; load it on its own base")
        other = next((n for n, d in (state.described if state else {}).items() if head in d.trained), None)
        if other is not None:
            raise EckartError(f"{head} would be overwritten, which the adapter {other!r} trains; drop that one first")
        came = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        needed = {key: tuple(tensor.shape) for key, tensor in modules[head].state_dict().items()}
        if came != needed:
            raise EckartError(f"the adapter has {head} as {came}, this model as {needed}; load it on its own base")
