"""Hosts: a map inside torch, as a module whose dense factors are real `nn.Linear` leaves.

`host(map)` and `map_of(module)` are inverses and share their tensors. A host is neither an `nn.Linear` subclass nor a
tensor subclass: of the carriers tried, only a composite of `nn.Linear` leaves works unchanged with FSDP2, tensor
parallelism, `torch.compile`, safetensors, adapters merged on top and quantized leaves inside.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.maps import Blocks, Dense, LinearMap, LowRank, Pivoted, Product, Scaled, Sum, require, require_shape

# Decoding one token, a factored layer makes this many more operator calls than a dense one; on CPU one call costs as
# much as reading about 60,000 float32 numbers from cache (timed by hand, 2-core x86).
EXTRA_CALLS = {LowRank: 1, Pivoted: 3}
NUMBERS_PER_CALL = 60_000


# What a temporary dense weight was made of: name, leaf (None for a buffer), tensor, its version and its address.
_Part = tuple[str, "nn.Module | None", Tensor, int, int]


class Host(nn.Module):
    """A structured linear layer y = W x + b, W a map; subclasses say how the map's parts are held.

    Attributes:
        in_features: n.
        out_features: m.
    """

    in_features: int
    out_features: int

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape

    @abstractmethod
    def held_map(self) -> LinearMap:
        """Return the map held, made of this module's own parameters."""

    @property
    def offset(self) -> Tensor | None:
        """The bias b (m,), or None."""
        return cast("Tensor | None", self.bias)

    def dense(self) -> Tensor:
        """Return W as a new matrix (m, n)."""
        return self.held_map().dense()

    def extra_repr(self) -> str:
        """Show sizes and storage in the module's repr."""
        held = sum(p.numel() for p in self.parameters())
        return f"in_features={self.in_features}, out_features={self.out_features}, numbers={held:,}"


class _Decoding(Host):
    """A host that computes with a temporary dense weight where that is faster than its factors.

    For small layers on CPU the operator calls of a factored layer cost more than the numbers it saves, so without
    gradients they go through a dense weight, made at the first call. It is forgotten with every call with gradients,
    every change of mode, dtype or device, and whenever a factor is replaced or written to in place. Only a write
    through `.data` leaves no trace; call `train()` or `eval()` after one.
    """

    def __init__(self, shape: tuple[int, int], map_type: type[LinearMap], numbers: int) -> None:
        super().__init__(shape)
        saved = shape[0] * shape[1] - numbers
        self._dense_decoding = saved < EXTRA_CALLS[map_type] * NUMBERS_PER_CALL
        self._decoding: tuple[tuple[_Part, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis: x (..., n) -> (..., m)."""
        if torch.compiler.is_compiling() or not self._dense_decoding:
            return self.structured(x)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            self._decoding = None
            return self.structured(x)
        self._refresh_decoding()
        return self.structured(x) if self._decoding is None else F.linear(x, self._decoding[1], self.offset)

    @abstractmethod
    def structured(self, x: Tensor) -> Tensor:
        """Apply through the factors."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the temporary dense weight is forgotten."""
        self._decoding = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What every move and cast of a module goes through; it may leave identity and version of a parameter alone.
        self._decoding = None
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _is_current(self, made_of: tuple[_Part, ...]) -> bool:
        """Tell whether nothing changed since a dense weight was made; called for every token, hence so spelled out."""
        modules, buffers = self._modules, self._buffers
        for name, leaf, tensor, version, pointer in made_of:
            if leaf is None:
                if buffers[name] is not tensor:
                    return False
            elif (
                modules[name] is not leaf
                or leaf._parameters["weight"] is not tensor
                or leaf._forward_hooks
                or leaf._forward_pre_hooks
                or "forward" in leaf.__dict__
            ):
                return False
            if tensor._version != version or tensor.data_ptr() != pointer:
                return False
        return True

    def _refresh_decoding(self) -> None:
        """Make the temporary dense weight if it is missing or stale; forget it where the factors must be called."""
        if self._decoding is not None and self._is_current(self._decoding[0]):
            return
        self._decoding = None
        held: list[tuple[str, nn.Module | None, Tensor]] = [
            (name, None, buffer) for name, buffer in self._buffers.items() if buffer is not None
        ]
        for name, leaf in self._modules.items():
            if leaf is None or not _is_plain(leaf):
                return
            held.append((name, leaf, cast(Tensor, leaf._parameters["weight"])))
        if held[-1][2].is_inference():  # does not count its versions
            return
        state = tuple((name, leaf, t, t._version, t.data_ptr()) for name, leaf, t in held)
        with torch.autocast("cpu", enabled=False):  # the weight may outlive the region it is made in
            self._decoding = state, self.held_map().dense().detach()


class LowRankHost(_Decoding):
    """y = up(down(x)): two `nn.Linear` leaves, the bias in `up`."""

    def __init__(self, map_: LowRank, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape, LowRank, map_.numbers)
        self.down = leaf(map_.down)
        self.up = leaf(map_.up, bias)

    def held_map(self) -> LinearMap:
        return LowRank(self.up.weight, self.down.weight)

    @property
    def offset(self) -> Tensor | None:
        return self.up.bias

    def structured(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.up(self.down(x)))


class PivotedHost(_Decoding):
    """The pivots and the combinations of them as `nn.Linear` leaves `basis` and `coefficients`, and their order."""

    order: Tensor

    def __init__(self, map_: Pivoted, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape, Pivoted, map_.numbers)
        self.axis = map_.axis
        self.basis = leaf(map_.basis)
        self.coefficients = leaf(map_.coefficients)
        self.register_buffer("order", map_.order)
        self.bias = _parameter(bias)

    def held_map(self) -> LinearMap:
        return Pivoted(self.basis.weight, self.coefficients.weight, self.order, self.axis)

    def structured(self, x: Tensor) -> Tensor:
        if _is_plain(self.basis) and _is_plain(self.coefficients):
            y = self.held_map()(x)
        elif self.axis == "rows":
            pivots = self.basis(x)
            y = torch.cat((pivots, self.coefficients(pivots)), dim=-1).index_select(-1, self.order)
        else:
            k, ordered = self.coefficients.out_features, x.index_select(-1, self.order)
            y = self.basis(ordered[..., :k] + self.coefficients(ordered[..., k:]))
        return y if self.bias is None else y + self.bias


class SumHost(Host):
    """y = term_0(x) + term_1(x) + ..., the terms as children "0", "1", ..."""

    def __init__(self, map_: Sum, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape)
        _add_children(self, map_.maps)
        self.bias = _parameter(bias)

    def held_map(self) -> LinearMap:
        return Sum(tuple(map_of(child) for child in self.children()))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        terms = list(self.children())
        y: Tensor = terms[0](x)
        for term in terms[1:]:
            y = y + term(x)
        return y if self.bias is None else y + self.bias


class ProductHost(Host):
    """y = factor_0(factor_1(...(x))), the factors as children "0", "1", ..., the last applied first."""

    def __init__(self, map_: Product, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape)
        _add_children(self, map_.maps)
        self.bias = _parameter(bias)

    def held_map(self) -> LinearMap:
        return Product(tuple(map_of(child) for child in self.children()))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        for factor in reversed(list(self.children())):
            x = factor(x)
        return x if self.bias is None else x + self.bias


class ScaledHost(Host):
    """y = scale * inner(x), the inner map as child "map"."""

    def __init__(self, map_: Scaled, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape)
        self.map = host(map_.map)
        self.scale = map_.scale
        self.bias = _parameter(bias)

    def held_map(self) -> LinearMap:
        return Scaled(map_of(self.map), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        y: Tensor = self.scale * self.map(x)
        return y if self.bias is None else y + self.bias


class BlocksHost(Host):
    """A grid of hosts, block (i, j) as child "i.j"."""

    def __init__(self, map_: Blocks, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape)
        for i, row in enumerate(map_.grid):
            self.add_module(str(i), nn.ModuleList(host(block) for block in row))
        self.bias = _parameter(bias)

    def held_map(self) -> LinearMap:
        return Blocks(tuple(tuple(map_of(block) for block in row.children()) for row in self.children()))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        rows = [list(row.children()) for row in self.children()]
        pieces = x.split([cast(Host, block).in_features for block in rows[0]], dim=-1)
        y = torch.cat([torch.stack([b(p) for b, p in zip(row, pieces, strict=True)]).sum(0) for row in rows], dim=-1)
        return y if self.bias is None else y + self.bias


class MapHost(Host):
    """Any other map: floating tensors as parameters, index tensors as buffers, inner maps as hosts, by field name.

    The map is rebuilt from them in every call.
    """

    def __init__(self, map_: LinearMap, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape)
        self._type, self._static = type(map_), dict[str, Any]()
        self._fields = [f.name for f in dataclasses.fields(cast(Any, map_))]
        for name in self._fields:
            value = getattr(map_, name)
            if isinstance(value, LinearMap):
                self.add_module(name, host(value))
            elif isinstance(value, Tensor) and value.is_floating_point():
                self.register_parameter(name, _parameter(value))
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                operation = f"host of {self._type.__name__}"
                require(not isinstance(value, tuple), operation, f"a tuple {name!r}", "a Sum or a Product")
                self._static[name] = value
        self.bias = _parameter(bias)

    def held_map(self) -> LinearMap:
        values = {name: getattr(self, name) for name in self._fields if name not in self._static}
        held = {name: map_of(v) if isinstance(v, nn.Module) else v for name, v in values.items()}
        return self._type(**held, **self._static)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        y = self.held_map()(x)
        return y if self.bias is None else y + self.bias


HOSTS: dict[type[LinearMap], type[Host]] = {
    LowRank: LowRankHost,
    Pivoted: PivotedHost,
    Sum: SumHost,
    Product: ProductHost,
    Scaled: ScaledHost,
    Blocks: BlocksHost,
}


def host(map_: LinearMap, bias: Tensor | None = None) -> nn.Module:
    """Return a module that computes y = W x + b and whose parameters share the map's tensors.

    Args:
        map_: the map W; `Dense` becomes an `nn.Linear`, anything else a `Host`.
        bias: b, (m,), or None.
    """
    if bias is not None:
        require_shape("host bias", bias, map_.shape[0])
    if isinstance(map_, Dense):
        return leaf(map_.weight, bias)
    made = HOSTS.get(type(map_), MapHost)
    return cast(Callable[..., nn.Module], made)(map_, bias)


def map_of(module: nn.Module) -> LinearMap:
    """Return the map a module holds, sharing its parameters: the inverse of `host`.

    Accepts hosts, `nn.Linear`, and the transposed `Conv1D` of GPT-2 in transformers.

    Raises:
        EckartError: for any other module, such as a factor wrapped by an adapter that is not merged yet.
    """
    if isinstance(module, Host):
        return module.held_map()
    if isinstance(module, nn.Linear):
        return Dense(module.weight)
    if is_conv1d(module):
        return Dense(cast(Tensor, module.weight).mT)
    raise EckartError(f"no map is held by a {type(module).__name__}; merge or remove what wraps the linear layer first")


def offset_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a linear module or host, (m,), or None."""
    return module.offset if isinstance(module, Host) else cast("Tensor | None", module.bias)


def is_conv1d(module: nn.Module) -> bool:
    """Tell the `Conv1D` of transformers: a linear layer that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain dense linear layer that a host can replace."""
    return type(module) is nn.Linear or is_conv1d(module)


def leaf(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return an `nn.Linear` around existing tensors, without initializing anything."""
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = cast(nn.Parameter, _parameter(weight))
    if bias is not None:
        made.bias = cast(nn.Parameter, _parameter(bias))
    return made


def _is_plain(leaf: nn.Module) -> bool:
    """Tell whether a leaf computes x W^T with its weight and nothing else happens: not wrapped by an adapter or a
    quantizer, no hook that loads, gathers or records, no stand-in of a functional transform for its weight.
    """
    return (
        type(leaf) is nn.Linear
        and type(leaf._parameters["weight"]) is nn.Parameter
        and not (leaf._forward_hooks or leaf._forward_pre_hooks or "forward" in leaf.__dict__)
    )


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor)


def _add_children(module: nn.Module, maps: tuple[LinearMap, ...]) -> None:
    for i, map_ in enumerate(maps):
        module.add_module(str(i), host(map_))
