"""Adding an adapter to a model: the door."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from eckart.errors import EckartError
from eckart.hosts import AdaptedHost, adaptable_layers, anatomy, replace
from eckart.methods.adapt.adapters import ATTRIBUTE, Adapters, State
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe
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
        seed: seed of everything random in the start.
        progress: told of the stages "statistics" and "gradients".
        settings: settings of the method by name, typed.

    Raises:
        EckartError: for bad input of any kind, in one sentence; the model is as it was then.
    """
    described = Described(method, dict(settings), seed)
    recipe = described.recipe()
    check_name(model, name)
    chosen = target_layers(model, targets)
    heads = _heads(model, trained)
    layers = _layers(model, chosen, recipe, data, seed, progress)
    built = {layer.name: recipe.build(layer) for layer in layers}
    for adapter in built.values():
        adapter.rule(recipe.rule)
    described = Described(method, dict(settings), seed, heads)
    return attach(model, name, described, built)


def check_name(model: nn.Module, name: str) -> None:
    """Check that an adapter of that name can be put on a model.

    Raises:
        EckartError: if the name is none or taken, or the model's adapters are merged.
    """
    if "." in name or not name:
        raise EckartError(f"an adapter's name must have at least one letter and no dot, got {name!r}")
    if hasattr(model, ATTRIBUTE):
        present = Adapters(model)
        if name in present.names:
            raise EckartError(f"there is an adapter called {name!r} already; give another name")
        present.require_unmerged()


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
            module = AdaptedHost(module)
            replace(model, layer, module)
        module.add(name, adapter)
    state.described[name] = described
    for head in described.trained:
        module = model.get_submodule(head).requires_grad_(True)
        state.heads_before.setdefault(head, {k: v.detach().clone() for k, v in module.state_dict().items()})
    Adapters(model).use(name)
    return model


def target_layers(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers that an adapter goes on, by name.

    Raises:
        EckartError: if a name fits no layer, or nothing is given and no blocks are found.
    """
    layers = adaptable_layers(model)
    if targets is None:
        blocks = tuple(f"{block}." for block in anatomy(model).blocks)
        return {name: layer for name, layer in layers.items() if name.startswith(blocks)}
    if isinstance(targets, str):
        found = {name: layer for name, layer in layers.items() if re.fullmatch(targets, name)}
        wanted = [targets] if not found else []
    else:
        found = {n: layer for n, layer in layers.items() if any(_ends(n, target) for target in targets)}
        wanted = [target for target in targets if not any(_ends(n, target) for n in layers)]
    if wanted or not found:
        ends = sorted({name.rpartition(".")[2] for name in layers})
        came = repr(wanted[0]) if wanted else "nothing"
        raise EckartError(f"targets name {came}, which no linear layer is called; there are {', '.join(ends)}")
    return found


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _heads(model: nn.Module, trained: Sequence[str] | None) -> tuple[str, ...]:
    """Return the full names of the modules that train whole."""
    names = [name for name, _ in model.named_modules() if name]
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
    found = data if isinstance(data, Statistics) else _gathered(model, chosen, recipe, data, progress)
    shared: dict[int, dict[str, Any]] = {}
    layers = []
    for name, module in chosen.items():
        base = module.base if isinstance(module, AdaptedHost) else module
        own = found.moments.get(name)
        derived = shared.setdefault(id(own), {}) if own is not None else {}
        layers.append(Layer(name, base, seed, None, own, found.gradients.get(name), derived))
    if recipe.ranks is not None:
        ranks = recipe.ranks(layers)
        for layer in layers:
            layer.rank = ranks[layer.name]
    return layers


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
    progress: Progress = silent,
) -> Statistics:
    """Return what every data-driven start needs of a model, from one pass forward and backward over data.

    Args:
        model: as `adapt` takes it.
        data: batches as the model is called with.
        targets: layers, as `adapt` takes them.
        progress: told of the stage "gradients".

    Raises:
        EckartError: for bad input of any kind, in one sentence.
    """
    return live_statistics(model, target_layers(model, targets), data, progress)


def adapters(model: nn.Module) -> Adapters:
    """Return the adapters of a model: to switch, weight, merge, save and remove them.

    Raises:
        EckartError: if it has none.
    """
    return Adapters(model)
