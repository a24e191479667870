"""Adding an adapter to a model: the door."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from eckart.errors import EckartError
from eckart.hosts import (
    AdaptedHost,
    Adapter,
    adaptable_layers,
    adapted_host,
    anatomy,
    is_convolution,
    replace,
)
from eckart.hosts.contextual import Sliced
from eckart.methods.adapt.adapters import ATTRIBUTE, Adapters, State
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe
from eckart.methods.adapt.skipping import shortcuts
from eckart.methods.adapt.table import ADAPTERS, adapter_recipe
from eckart.progress import Progress, silent
from eckart.stats import Batch, Statistics, live_gradients, live_moments, live_statistics

# Heads that transformers makes anew for a task, and that no fine-tuning makes sense without training.
HEADS = ("classifier", "score", "qa_outputs")


def adapt(
    model: nn.Module,
    method: str = "lora",
    *,
    name: str = "default",
    targets: str | Sequence[str] | None = None,
    trained: Sequence[str] | None = None,
    data: Iterable[Batch] | Statistics | None = None,
    after: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **settings: Any,
) -> nn.Module:
    """Add an adapter to the linear layers of a model, freeze everything else, and return the same model.

    Any training loop can train what it returns; `eckart.adapters(model)` switches, merges, saves and removes.

    Args:
        model: a model of transformers, compressed by eckart or not, or any module of linear layers.
        method: one of `eckart.ADAPTERS`.
        name: what the adapter is called; a second one on the same model needs another name.
        targets: names of layers as they end ("q_proj"), or one regular expression that a whole name must match; by
            default every linear layer inside the blocks.
        trained: names of modules, as they end, that train whole beside the adapter; by default the heads that
            transformers makes for a task (classifier, score, qa_outputs).
        data: batches as the model is called with, for methods that start from data; a few hundred sequences do. Or
            what `eckart.start_statistics` made of them, for several adapters from one pass.
        after: the adapter of an earlier task that this one builds on, for methods that can; it does not train any more.
        seed: seed of everything random in the start.
        progress: told of the stages "statistics" and "gradients".
        settings: settings of the method by name, typed.

    Raises:
        EckartError: for bad input of any kind, in one sentence; the model is as it was then.
    """
    if not isinstance(model, nn.Module):
        raise EckartError(f"adapt takes a loaded model, got {model!r}; eckart.tune takes a folder")
    check_seed(seed)
    described = Described(method, dict(settings), seed)
    recipe = described.recipe()
    check_name(model, name)
    chosen = target_layers(model, targets)
    heads = _heads(model, trained)
    earlier = {} if after is None else _earlier(model, after, described, chosen, heads)
    layers = _layers(model, chosen, recipe, data, seed, progress)
    for layer in layers:
        layer.earlier = earlier.get(layer.name)
    built = {layer.name: recipe.build(layer) for layer in layers}
    follow(model, built, recipe, seed)
    for adapter in earlier.values():
        adapter.freeze()
    described = Described(method, dict(settings), seed, heads)
    return attach(model, name, described, built)


def follow(model: nn.Module, built: Mapping[str, Adapter], recipe: Recipe, seed: int) -> None:
    """Have adapters that are about to go on a model train as their method says."""
    for adapter in built.values():
        adapter.rule(recipe.rule)
    if recipe.skipping is not None:
        for name, shortcut in shortcuts(model, built, recipe.skipping, seed).items():
            built[name].shortcut = shortcut


def _earlier(
    model: nn.Module, after: str, described: Described, chosen: Mapping[str, nn.Module], heads: Sequence[str]
) -> dict[str, Adapter]:
    """Return the adapter that a new one builds on, by layer.

    Raises:
        EckartError: if there is none, it is of another kind or on other layers, or what it computes would change.
    """
    handle = adapters(model)
    handle.require(after)
    method = handle.state.described[after].method
    require_follower(described)
    if method != described.method:
        raise EckartError(f"{described.method} builds on adapters of its own kind, and {after!r} is of {method}")
    if heads:
        raise EckartError(f"{heads[0]} would train whole and change what {after!r} computes; give trained=()")
    found = {name: layer.adapter(after) for name, layer in handle.layers.items() if after in layer.adapters}
    if found.keys() != chosen.keys():
        other = min(found.keys() ^ chosen.keys())
        raise EckartError(f"{after!r} and the new adapter must be on the same layers; {other} has one of both")
    return found


def require_follower(described: Described) -> None:
    """Raise an `EckartError` for a method whose adapters do not build on earlier ones."""
    if not described.recipe().follows:
        able = " or ".join(name for name in ADAPTERS if adapter_recipe(name, {}).follows)
        raise EckartError(f"{described.method} builds on no earlier adapter; leave after out, or take {able}")


def check_seed(seed: int) -> None:
    """Raise an `EckartError` for a seed that leaves no room for what is drawn with it."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 32:
        raise EckartError(f"seed must be a whole number from 0 to {(1 << 32) - 1}, got {seed!r}")


def check_name(model: nn.Module, name: str) -> None:
    """Check that an adapter of that name can be put on a model.

    Raises:
        EckartError: if the name is none or taken, or the model's adapters are merged.
    """
    if not isinstance(name, str) or "." in name or not name:
        raise EckartError(f"an adapter's name must have at least one letter and no dot, got {name!r}")
    if hasattr(model, ATTRIBUTE):
        Adapters(model).require_new(name)


def attach(model: nn.Module, name: str, described: Described, built: Mapping[str, Any]) -> nn.Module:
    """Put built adapters on the layers of a model, and make them the active ones."""
    state: State | None = getattr(model, ATTRIBUTE, None)
    if state is None:
        state = State({}, [n for n, p in model.named_parameters() if p.requires_grad], {})
        setattr(model, ATTRIBUTE, state)
        model.requires_grad_(False)
    for layer, adapter in built.items():
        module = model.get_submodule(layer)
        if not isinstance(module, AdaptedHost):
            module = adapted_host(module)
            replace(model, layer, module)
        module.add(name, adapter)
    state.described[name] = described
    whole = next((a.shortcut.choice.whole for a in built.values() if isinstance(a.shortcut, Sliced)), None)
    if whole is not None:
        state.hooks[name] = model.register_forward_pre_hook(whole, with_kwargs=True)
    for head in described.trained:
        module = model.get_submodule(head).requires_grad_(True)
        state.heads_before.setdefault(head, {k: v.detach().clone() for k, v in module.state_dict().items()})
    Adapters(model).use(name)
    return model


def target_layers(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers that an adapter goes on, by name.

    Without targets these are the linear layers inside the blocks; of a model that has none, its convolutions.

    Raises:
        EckartError: if a name fits no layer or a convolution in groups, or nothing is given and nothing is found.
    """
    layers = adaptable_layers(model)
    if not layers:
        raise EckartError(f"{type(model).__name__} has no linear layer or convolution wide enough to be adapted")
    if targets is None:
        grids = {name: base for name, base in _bases(layers).items() if is_convolution(base)}
        whole = {name: layers[name] for name, base in grids.items() if base.groups == 1}
        if whole and len(grids) > len(layers) / 2:  # a network of convolutions with a few linear layers
            return whole
        try:
            blocks = tuple(f"{block}." for block in anatomy(model).blocks)
        except EckartError as error:
            raise EckartError(f"{error}; name the layers to adapt in targets") from error
        return {name: layer for name, layer in layers.items() if name.startswith(blocks) and name not in grids}
    if not isinstance(targets, Sequence):
        raise EckartError(f"targets must be a list of names or a regular expression, got {targets!r}")
    if isinstance(targets, str):
        pattern = _pattern(targets)
        found = {name: layer for name, layer in layers.items() if pattern.fullmatch(name)}
        wanted = [targets] if not found else []
    else:
        found = {n: layer for n, layer in layers.items() if any(_ends(n, target) for target in targets)}
        wanted = [target for target in targets if not any(_ends(n, target) for n in layers)]
    if wanted or not found:
        ends = sorted({name.rpartition(".")[2] for name in layers})
        came = repr(wanted[0]) if wanted else "nothing"
        raise EckartError(f"targets name {came}, which no linear layer is called; there are {', '.join(ends)}")
    split = next((name for name, base in _bases(found).items() if is_convolution(base) and base.groups != 1), None)
    if split is not None:
        raise EckartError(f"{split} convolves in several groups, so that no one matrix stands for it; leave it out")
    return found


def _pattern(targets: str) -> re.Pattern[str]:
    try:
        return re.compile(targets)
    except re.error as error:
        raise EckartError(f"targets {targets!r} is no regular expression ({error}); give one, or a list") from None


def _bases(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return layers without their adapters."""
    return {name: layer.base if isinstance(layer, AdaptedHost) else layer for name, layer in layers.items()}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _heads(model: nn.Module, trained: Sequence[str] | None) -> tuple[str, ...]:
    """Return the full names of the modules that train whole."""
    names = [name for name, _ in model.named_modules() if name]
    trained = (trained,) if isinstance(trained, str) else trained
    wanted = HEADS if trained is None else tuple(trained)
    found = [name for name in names if any(_ends(name, one) for one in wanted)]
    outermost = tuple(n for n in found if not any(n.startswith(f"{other}.") for other in found))
    missing = [one for one in trained or () if not any(_ends(name, one) for name in names)]
    if missing:
        raise EckartError(f"no module is called {missing[0]!r}; trained takes names of modules as they end")
    return outermost


def _layers(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    recipe: Recipe,
    data: Iterable[Batch] | Statistics | None,
    seed: int,
    progress: Progress,
) -> list[Layer]:
    """Return what the page sees of every layer, with the statistics that the recipe asks for."""
    if recipe.uses_inputs or recipe.uses_gradients:
        _check_gathered(chosen, "use another method")
    found = data if isinstance(data, Statistics) else _gathered(model, chosen, recipe, data, progress)
    shared: dict[int, dict[str, Any]] = {}
    layers = []
    for name, base in _bases(chosen).items():
        own = found.moments.get(name)
        derived = shared.setdefault(id(own), {}) if own is not None else {}
        layers.append(Layer(name, base, seed, None, own, found.gradients.get(name), derived))
    if recipe.ranks is not None:
        ranks = recipe.ranks(layers)
        for layer in layers:
            layer.rank = ranks[layer.name]
    return layers


def _check_gathered(chosen: Mapping[str, nn.Module], instead: str) -> None:
    """Refuse layers whose inputs and gradients are not gathered."""
    grid = next((name for name, base in _bases(chosen).items() if is_convolution(base)), None)
    if grid is not None:
        raise EckartError(f"{grid} is a convolution, whose inputs and gradients are not gathered; {instead}")


def _gathered(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    recipe: Recipe,
    data: Iterable[Batch] | None,
    progress: Progress,
) -> Statistics:
    """Return the statistics that a recipe asks for."""
    batches = list(data or ())
    if (recipe.uses_inputs or recipe.uses_gradients) and not batches:
        raise EckartError("this method starts from data; give data= a few batches as the model is called with")
    moments = live_moments(model, chosen, batches, progress) if recipe.uses_inputs else {}
    return Statistics(moments, live_gradients(model, chosen, batches, progress) if recipe.uses_gradients else {})


def start_statistics(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    targets: str | Sequence[str] | None = None,
    gradients: bool = True,
    progress: Progress = silent,
) -> Statistics:
    """Return what every data-driven start needs of a model, from one pass forward and backward over data.

    Args:
        model: as `adapt` takes it.
        data: batches as the model is called with.
        targets: layers, as `adapt` takes them.
        gradients: whether a start needs gradients, as lora-sb does; for corda and eva alone a pass forward is enough.
        progress: told of the stage "gradients", or "statistics" without them.

    Raises:
        EckartError: for bad input of any kind, in one sentence.
    """
    chosen = target_layers(model, targets)
    _check_gathered(chosen, "give targets= without it")
    if not gradients:
        return Statistics(live_moments(model, chosen, data, progress), {})
    return live_statistics(model, chosen, data, progress)


def adapters(model: nn.Module) -> Adapters:
    """Return the adapters of a model: to switch, weight, merge, save and remove them.

    Raises:
        EckartError: if it has none.
    """
    return Adapters(model)
