"""A frozen linear layer with named adapters: switched, weighted, mixed per request, merged and taken out again."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.hosts.adapter import Adapter, Inner
from eckart.hosts.anatomy import NARROW
from eckart.hosts.base import Host
from eckart.hosts.decoding import is_plain
from eckart.hosts.factored import factored_rescale
from eckart.hosts.host import host, is_convolution, is_linear, map_of, offset_of
from eckart.maps import LinearMap


class AdaptedHost(Host):
    """y = W' x + b, W' the base's map after every active adapter in turn.

    Attributes:
        base: the layer adapted; its parameters are frozen.
        adapters: by name.
        active: weight of every active adapter by name, in the order in which they are composed.
        requests: for every sequence of the batch the name of its adapter, or None for the base alone; None if all
            sequences take the active ones.
    """

    base: nn.Module
    adapters: nn.ModuleDict
    active: dict[str, float]
    requests: tuple[str | None, ...] | None
    _merged: tuple[nn.Module, ...]

    def __init__(self, base: nn.Module) -> None:
        super().__init__(map_of(base).shape)
        self.base, self.adapters, self.active, self.requests = base.requires_grad_(False), nn.ModuleDict(), {}, None
        self._merged = ()  # inside a tuple: no submodule, whose parameters would be saved and trained

    @property
    def offset(self) -> Tensor | None:
        return offset_of(self.base)

    def held_map(self) -> LinearMap:
        return self.adapted(self.active)

    def adapted(self, weights: Mapping[str, float]) -> LinearMap:
        """Return the map with adapters of those weights, composed in that order."""
        out = map_of(self.base)
        for name, weight in weights.items():
            out = self.adapter(name).of(out, weight)
        return out

    def adapter(self, name: str) -> Adapter:
        """Return an adapter by name."""
        return cast(Adapter, self.adapters[name])

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter, in the mode and on the device of the layer; it is not active yet."""
        self.adapters[name] = adapter.to(next(iter(self.base.parameters())).device).train(self.training)

    def hosted(self, map_: LinearMap, offset: Tensor | None) -> nn.Module:
        """Return a module with another map and offset that can stand for the layer."""
        return host(map_, offset)

    def merge(self, module: nn.Module) -> None:
        """Compute with another module, which stands for the adapted one, until `unmerge`."""
        self._merged = (module.requires_grad_(False),)

    def unmerge(self) -> None:
        """Compute with the base and its adapters again; the base was never touched."""
        self._merged = ()

    @property
    def is_merged(self) -> bool:
        """Whether a merged module stands for the layer."""
        return bool(self._merged)

    @property
    def computing(self) -> nn.Module:
        """What the layer is without its adapters: the merged module if there is one, the base otherwise."""
        return self._merged[0] if self._merged else self.base

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis: x (..., n) -> (..., m)."""
        if self._merged:
            return cast(Tensor, self._merged[0](x))
        if self.requests is not None:
            return self._by_request(x, self.requests)
        return self.with_adapters(x, self.active)

    def with_adapters(self, x: Tensor, weights: Mapping[str, float], sequences: Tensor | None = None) -> Tensor:
        """Apply with adapters of those weights, composed in that order, whichever are active.

        Args:
            x: inputs, of all sequences of the batch or of some.
            weights: by name.
            sequences: which sequences of the batch they are, or None for all.
        """
        if not weights:
            return cast(Tensor, self.base(x))
        chain = [(self.adapter(name), weight) for name, weight in weights.items()]
        if len(chain) == 1 and chain[0][1] == 1.0:
            y = factored_rescale(x, self.base, chain[0][0])
            if y is not None:
                return y
        keeps_bias = all(adapter.keeps_bias for adapter, _ in chain)
        call = self.base if keeps_bias else self._without_bias
        current = Inner(call, lambda: map_of(self.base), self._dense(x, keeps_bias), sequences)
        for adapter, weight in chain:
            current = adapter.within(current, weight)
        y, offset = current.call(x), None if keeps_bias else self.offset
        return y if offset is None else y + offset

    def _dense(self, x: Tensor, keeps_bias: bool) -> tuple[Tensor, Tensor | None] | None:
        """Return weight and bias of a frozen base that is one product in the dtype of x, None for any other."""
        if type(self.base) is not nn.Linear or not is_plain(self.base):
            return None
        weight, bias = self.base.weight, self.base.bias
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        if learns or weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        return weight, bias if keeps_bias else None

    def _without_bias(self, x: Tensor) -> Tensor:
        if type(self.base) is nn.Linear:
            return F.linear(x, self.base.weight)
        y, offset = self.base(x), self.offset
        return cast(Tensor, y if offset is None else y - offset)

    def _by_request(self, x: Tensor, requests: Sequence[str | None]) -> Tensor:
        """Apply to every sequence of a batch the adapter it asks for."""
        if x.shape[0] != len(requests):
            raise EckartError(
                f"{len(requests)} requests were named for a batch of {x.shape[0]}; name one adapter, or None, for each"
            )
        y: Tensor | None = None
        for name in dict.fromkeys(requests):
            rows = torch.tensor([i for i, wanted in enumerate(requests) if wanted == name], device=x.device)
            weights = {} if name is None or name not in self.adapters else {name: 1.0}
            part = self.with_adapters(x.index_select(0, rows), weights, rows).to(x.dtype)
            y = x.new_empty(len(requests), *part.shape[1:]) if y is None else y
            y = y.index_copy(0, rows, part)
        return cast(Tensor, y)

    def extra_repr(self) -> str:
        """Show the sizes and which adapters are active."""
        state = "merged" if self.is_merged else f"active={list(self.active)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {state}"


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that an adapter can go on, by name: linear, structured, convolutions, or adapted.

    What is inside one of them is part of it. Layers too narrow to carry features are left out, as in compression.
    """
    out: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in out)
        kind = isinstance(module, Host) or is_linear(module) or is_convolution(module)
        if not inside and kind and min(_shape(module)) > NARROW:
            out[name] = module
    return out


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in), of adapters without asking for the map, which some do not have."""
    if isinstance(module, Host):
        return module.out_features, module.in_features
    if is_convolution(module):  # in groups as well, which have no map
        weight = cast(Tensor, module.weight)
        return weight.shape[0], weight[0].numel()
    return map_of(module).shape
