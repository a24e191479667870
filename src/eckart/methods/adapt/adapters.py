"""The adapters of a model: which there are, which are active, and taking them in and out."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eckart.errors import EckartError
from eckart.hosts import AdaptedHost, is_convolution, replace
from eckart.hosts.adapter import Plus
from eckart.hosts.decoding import is_plain
from eckart.hosts.host import LowRankHost
from eckart.maps import LowRank
from eckart.methods.adapt.between import Between, Followed, follow
from eckart.methods.adapt.combining import combination, combined
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.merging import merged
from eckart.methods.adapt.recipe import Recipe
from eckart.methods.adapt.saving import Format, save_adapter
from eckart.methods.pages import nearest
from eckart.stats import Batch, Moments, live_moments

# Where a model keeps the description of its adapters, and which of its parameters trained before the first one.
ATTRIBUTE = "eckart_adapters"


@dataclass(slots=True)
class State:
    """What a model remembers: its adapters by name, the parameters that trained before, and what the modules that train
    whole held then; and the hooks by which adapters look at what the model is called with.
    """

    described: dict[str, Described]
    trained_before: list[str]
    heads_before: dict[str, dict[str, Tensor]]
    hooks: dict[str, RemovableHandle] = field(default_factory=dict)


class Adapters:
    """The adapters of a model, by name.

    Attributes:
        model: the model.
        layers: the adapted layers by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedHost)}
        if not self.layers:
            raise EckartError(f"{type(model).__name__} has no adapters; eckart.adapt(model, ...) adds one")

    @property
    def state(self) -> State:
        """What the model remembers of its adapters."""
        return cast(State, getattr(self.model, ATTRIBUTE))

    @property
    def names(self) -> list[str]:
        """The names of all adapters."""
        return list(self.state.described)

    @property
    def active(self) -> dict[str, float]:
        """Weight of every active adapter, in the order in which they are composed."""
        return {name: weight for layer in self.layers.values() for name, weight in layer.active.items()}

    def use(self, *names: str, **weights: float) -> None:
        """Make adapters active: by name, or by name = weight; none at all leaves the base alone.

        Several compose in the order given. Weight w stands for W + w (f(W) - W).
        """
        wanted = {**dict.fromkeys(names, 1.0), **weights}
        for name, weight in wanted.items():
            self.require(name)
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise EckartError(f"the weight of {name} must be a finite number, got {weight!r}")
        self.require_unmerged()
        for layer in self.layers.values():
            layer.active = {name: weight for name, weight in wanted.items() if name in layer.adapters}
        self._train_only(wanted)

    @contextmanager
    def requests(self, names: Sequence[str | None]) -> Iterator[None]:
        """Apply to every sequence of the batches inside the `with` the adapter it asks for; None is the base."""
        for name in names:
            if name is not None:
                self.require(name)
        self.require_unmerged()
        for layer in self.layers.values():
            layer.requests = tuple(names)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.requests = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute with the base alone inside the `with`."""
        kept = {name: layer.active for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.active = {}
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.active = kept[name]

    def merge(self, data: Iterable[Batch] | None = None) -> dict[str, float]:
        """Compute with merged layers from now on; return the share of each layer's change that its structure loses.

        The base stays in memory untouched, so `unmerge` restores it to the bit.

        Args:
            data: batches as the model is called with; layers that cannot hold all of the change are then merged to
                give the nearest outputs on what they see there, not the nearest weights, and the share lost is that.

        Raises:
            EckartError: if no matrix stands for an adapter, or the batches never reach a layer; nothing is merged then.
        """
        wanted = {name: layer for name, layer in self.layers.items() if layer.active and not layer.is_merged}
        seen = self._seen(wanted, data)
        made = {name: merged(layer, seen.get(name)) for name, layer in wanted.items()}
        for name, (module, _) in made.items():  # only once all are there: one that refuses leaves the model alone
            self.layers[name].merge(module)
        return {name: lost for name, (_, lost) in made.items()}

    def unmerge(self) -> None:
        """Compute with the base and its adapters again."""
        for layer in self.layers.values():
            layer.unmerge()

    def fold(self, data: Iterable[Batch] | None = None) -> nn.Module:
        """Merge for good, as `merge` does, what is not merged yet; return the model without a trace of adapters."""
        self.merge(data)
        for name, layer in self.layers.items():
            replace(self.model, name, layer.computing)
        self._forget()
        return self.model

    def _seen(self, layers: Mapping[str, AdaptedHost], data: Iterable[Batch] | None) -> dict[str, Moments]:
        """Return the moments of what layers see in data, but for convolutions, which hold all of any change."""
        asked = {name: layer for name, layer in layers.items() if not is_convolution(layer.base)}
        return {} if data is None or not asked else live_moments(self.model, asked, data)

    def remove(self) -> nn.Module:
        """Take all adapters out and return the model as it was, modules that trained whole included."""
        for name, layer in self.layers.items():
            replace(self.model, name, layer.base)
        for name, state in self.state.heads_before.items():
            self.model.get_submodule(name).load_state_dict(state)
        self._forget()
        return self.model

    def drop(self, name: str) -> None:
        """Delete one adapter."""
        self.require(name)
        self.require_unmerged()
        for layer in self.layers.values():
            layer.active.pop(name, None)
            if name in layer.adapters:
                del layer.adapters[name]
        del self.state.described[name]
        if name in self.state.hooks:
            self.state.hooks.pop(name).remove()

    def combine(self, *names: str, how: str = "task-masks", into: str = "combined", **settings: Any) -> list[str]:
        """Make new adapters of several: one for all of them, or one for each that shares its weights with the others.

        The new ones do not train and are not active yet; the old ones stay until they are dropped.

        Args:
            names: the adapters, two at least.
            how: "sum", "mean", "ties", or "task-masks", which keeps every task's own part of the sum.
            into: what the new adapter is called; "task-masks" makes one per task, called "<into>:<name>".
            settings: of the way to combine, by name.

        Returns:
            The names of the new adapters.

        Raises:
            EckartError: for unknown names, or an adapter that depends on its input; nothing is added then.
        """
        if len(set(names)) < 2 or len(set(names)) != len(names):
            raise EckartError(f"combine takes two different adapters or more, got {', '.join(names) or 'none'}")
        for name in names:
            self.require(name)
        way = combination(how, settings)
        new = [f"{into}:{name}" for name in names] if way.per_task else [into]
        for name in new:
            self.require_new(name)
        chosen = {n: layer for n, layer in self.layers.items() if any(name in layer.adapters for name in names)}
        made = {n: combined(layer, names, way) for n, layer in chosen.items()}
        for n, adapters in made.items():
            for name, adapter in zip(new, adapters, strict=True):
                self.layers[n].add(name, adapter)
        for name in new:
            self.state.described[name] = Described(how, settings, 0)
        return new

    def save(self, folder: str | Path, name: str | None = None, *, format: Format = "eckart") -> None:
        """Write an adapter to a folder of its own, which `eckart.load_adapter` puts back.

        Args:
            folder: where; must not hold anything yet.
            name: the adapter; may be left out if there is one, or one is active.
            format: "eckart" keeps everything, bit for bit; "peft" writes what PEFT and its followers read, for methods
                that it can express.

        Raises:
            EckartError: if the folder cannot be written or the format cannot express the adapter; nothing is written.
        """
        name = self._one(name)
        save_adapter(self.model, self.layers, name, self.state.described[name], Path(folder), format)

    def factors(self, name: str | None = None) -> dict[str, LowRank]:
        """Return copies of an adapter's low-rank changes by layer: what the client of a federation sends.

        Args:
            name: the adapter; may be left out if there is one, or one is active.

        Raises:
            EckartError: if it is not one plain low-rank change on every layer.
        """
        pairs = self._pairs(self._one(name))
        return {n: LowRank(up.detach().clone(), down.detach().clone()) for n, (up, down) in pairs.items()}

    def put_factors(self, factors: Mapping[str, LowRank], name: str | None = None) -> None:
        """Overwrite an adapter's low-rank changes: what the client of a federation receives.

        Args:
            factors: by layer, as `factors` and `eckart.recombine` return them.
            name: the adapter; may be left out if there is one, or one is active.

        Raises:
            EckartError: if layers or shapes are others; nothing is overwritten then.
        """
        pairs = self._pairs(self._one(name))
        came = {n: (tuple(pair.up.shape), tuple(pair.down.shape)) for n, pair in factors.items()}
        wanted = {n: (tuple(up.shape), tuple(down.shape)) for n, (up, down) in pairs.items()}
        wrong = next((n for n in wanted | came if wanted.get(n) != came.get(n)), None)
        if wrong is not None:
            raise EckartError(f"factors of {wrong} are {came.get(wrong)} where {wanted.get(wrong)} belongs")
        with torch.no_grad():
            for n, (up, down) in pairs.items():
                up.copy_(factors[n].up)
                down.copy_(factors[n].down)

    def parameter_groups(self, rate: float | None = None, **options: Any) -> list[dict[str, Any]]:
        """Return the trained parameters as groups for any optimizer of torch, with each one's own learning rate.

        Args:
            rate: learning rate; by default that of the method of the first active adapter.
            options: written into every group, such as weight_decay.
        """
        recipes = {name: self.state.described[name].recipe() for name in self.active}
        if rate is None:
            rate = next(iter(recipes.values())).rate if recipes else 1e-3
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self._share(name, recipes), []).append(parameter)
        return [{"params": found, "lr": rate * share, **options} for share, found in groups.items()]

    def penalty(self) -> Tensor | float:
        """Return what the active adapters' methods add to the loss; 0.0 for most methods."""
        total: Tensor | float = 0.0
        for name in self.active:
            penalty = self.state.described[name].recipe().penalty
            if penalty is not None:
                for layer in self.layers.values():
                    if name in layer.active:
                        total = total + penalty(layer.adapter(name))
        return total

    def follow(self, optimizer: Any, steps: int) -> RemovableHandle:
        """Have done what the active adapters' methods do between the steps of an optimizer; nothing for most methods.

        Without it, these methods train what they start with. It is called before the first step, and by a run that
        goes on from saved states before it loads them; the optimizer may be wrapped by accelerate.

        Args:
            optimizer: made of `parameter_groups()`.
            steps: how many steps it will make.

        Returns:
            What ends it by `remove()`.

        Raises:
            EckartError: if the optimizer is none of torch, does not train the adapters, or is followed already.
        """
        followed = []
        for name, described in self._moved().items():
            for at, layer in self.layers.items():
                if name in layer.adapters:
                    own, between = Layer(at, layer.base, described.seed), cast(Between, described.recipe().between)
                    followed.append(Followed(name, layer, layer.adapter(name), own, between))
        return follow(followed, optimizer, steps)

    def moving(self) -> list[str]:
        """Return the names of the model's frozen parameters that change between optimizer steps."""
        return [
            f"{at}.adapters.{name}.{own}"
            for name in self._moved()
            for at, layer in self.layers.items()
            if name in layer.adapters
            for own in layer.adapter(name).fixed()
        ]

    def _moved(self) -> dict[str, Described]:
        active = {name: self.state.described[name] for name in self.active}
        return {name: described for name, described in active.items() if described.recipe().between is not None}

    def count(self) -> int:
        """Return how many parameters train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _share(self, parameter: str, recipes: Mapping[str, Recipe]) -> float:
        for name, recipe in recipes.items():
            if f".adapters.{name}." in parameter:
                return next((share for part, share in recipe.shares.items() if part in parameter), 1.0)
        return 1.0

    def _one(self, name: str | None) -> str:
        """Return the adapter that is meant."""
        if name is None:
            among = self.names if len(self.names) == 1 else list(self.active)
            if len(among) != 1:
                raise EckartError(f"which adapter? Give name=, one of {', '.join(self.names)}")
            name = among[0]
        self.require(name)
        return name

    def _pairs(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors of an adapter by layer."""
        pairs = {}
        for layer, module in self.layers.items():
            match module.adapter(name).chain() if name in module.adapters else []:
                case []:
                    continue
                case [Plus(delta=LowRankHost(up=up, down=down))] if is_plain(up) and is_plain(down):
                    pairs[layer] = up.weight, down.weight
                case _:
                    raise EckartError(f"{name!r} is not one low-rank change on {layer}; use a method such as fedsvd")
        return pairs

    def require(self, name: str) -> None:
        """Raise an `EckartError` unless there is an adapter of that name."""
        if name not in self.state.described:
            raise EckartError(f"no adapter is called {name!r}; {nearest(name, self.names)}")

    def require_new(self, name: str) -> None:
        """Raise an `EckartError` unless an adapter of that name can be added."""
        if not name or "." in name:  # names are parts of parameters' names
            raise EckartError(f"an adapter's name must have at least one letter and no dot, got {name!r}")
        if name in self.names:
            raise EckartError(f"there is an adapter called {name!r} already; give another name")
        self.require_unmerged()

    def require_unmerged(self) -> None:
        """Raise an `EckartError` if merged layers stand for the adapted ones."""
        if any(layer.is_merged for layer in self.layers.values()):
            raise EckartError("the adapters are merged; call unmerge() first")

    def _train_only(self, wanted: Mapping[str, float]) -> None:
        """Let exactly the active adapters train, and of them what their methods train."""
        for layer in self.layers.values():
            for name in layer.adapters:
                for parameter in layer.adapter(name).trained():
                    parameter.requires_grad_(name in wanted)

    def _forget(self) -> None:
        before = set(self.state.trained_before)
        for hook in self.state.hooks.values():
            hook.remove()
        delattr(self.model, ATTRIBUTE)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in before)
