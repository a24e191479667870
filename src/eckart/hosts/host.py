"""Hosts: a map inside torch, as a module whose dense factors are real `nn.Linear` leaves.

`host(map)` and `map_of(module)` are inverses and share their tensors. A host is neither an `nn.Linear` subclass nor a
tensor subclass: of the carriers tried, only a composite of `nn.Linear` leaves works unchanged with FSDP2, tensor
parallelism, `torch.compile`, safetensors, adapters merged on top and quantized leaves inside.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts.base import Host
from eckart.hosts.decoding import DecodingHost, is_plain
from eckart.maps import (
    Bitmap,
    Blocks,
    Dense,
    Interleaved,
    LinearMap,
    LowRank,
    Pivoted,
    Product,
    Quantized,
    Scaled,
    Sum,
    by_compressed_rows,
    compressed_rows,
    expands,
    interleaving,
    multiply_compressed_rows,
    multiply_pivoted,
    require,
    require_shape,
)


class LowRankHost(DecodingHost):
    """y = up(down(x)): two `nn.Linear` leaves, the bias in `up`."""

    def __init__(self, map_: LowRank, bias: Tensor | None = None) -> None:
        super().__init__(map_)
        self.down = leaf(map_.down)
        self.up = leaf(map_.up, bias)

    def held_map(self) -> LinearMap:
        return LowRank(self.up.weight, self.down.weight)

    @property
    def bias_owner(self) -> nn.Module:
        return cast(nn.Module, self._modules["up"])

    @property
    def offset(self) -> Tensor | None:
        return self.bias_owner._parameters["bias"]

    def structured(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.up(self.down(x)))


class PivotedHost(DecodingHost):
    """The pivots and the combinations of them as `nn.Linear` leaves `basis` and `coefficients`, and their order."""

    order: Tensor

    def __init__(self, map_: Pivoted, bias: Tensor | None = None) -> None:
        super().__init__(map_)
        self.axis, self.rank = map_.axis, map_.rank
        self.basis = leaf(map_.basis)
        self.coefficients = leaf(map_.coefficients)
        self.register_buffer("order", map_.order)
        self.register_parameter("bias", _parameter(bias))

    def held_map(self) -> LinearMap:
        return Pivoted(self.basis.weight, self.coefficients.weight, self.order, self.axis)

    def structured(self, x: Tensor) -> Tensor:
        basis, coefficients, order = self.basis, self.coefficients, self.order
        if is_plain(basis) and is_plain(coefficients):
            learns = torch.is_grad_enabled() and (x.requires_grad or basis.weight.requires_grad)
            if expands(self.rank, order.shape[0], x.numel() // max(self.in_features, 1), learns):
                y = self.held_map()(x)
            else:
                y = multiply_pivoted(x, basis.weight, coefficients.weight, order, self.axis)
        elif self.axis == "rows":
            pivots = basis(x)
            y = torch.cat((pivots, coefficients(pivots)), dim=-1).index_select(-1, order)
        else:
            ordered = x.index_select(-1, order)
            y = basis(ordered[..., : self.rank] + coefficients(ordered[..., self.rank :]))
        return y if self.offset is None else y + self.offset


class SumHost(DecodingHost):
    """y = term_0(x) + term_1(x) + ..., the terms as children "0", "1", ..."""

    def __init__(self, map_: Sum, bias: Tensor | None = None) -> None:
        super().__init__(map_)
        _add_children(self, map_.maps)
        self.register_parameter("bias", _parameter(bias))

    def held_map(self) -> LinearMap:
        return Sum(tuple(map_of(child) for child in self.children()))

    def structured(self, x: Tensor) -> Tensor:
        terms = list(self.children())
        y: Tensor = terms[0](x)
        for term in terms[1:]:
            y = y + term(x)
        return y if self.offset is None else y + self.offset


class ProductHost(DecodingHost):
    """y = factor_0(factor_1(...(x))), the factors as children "0", "1", ..., the last applied first."""

    def __init__(self, map_: Product, bias: Tensor | None = None) -> None:
        super().__init__(map_)
        _add_children(self, map_.maps)
        self.register_parameter("bias", _parameter(bias))

    def held_map(self) -> LinearMap:
        return Product(tuple(map_of(child) for child in self.children()))

    def structured(self, x: Tensor) -> Tensor:
        for factor in reversed(list(self.children())):
            x = factor(x)
        return x if self.offset is None else x + self.offset


class ScaledHost(Host):
    """y = scale * inner(x), the inner map as child "map"."""

    def __init__(self, map_: Scaled, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape)
        self.map = host(map_.map)
        self.scale = map_.scale
        self.register_parameter("bias", _parameter(bias))

    def held_map(self) -> LinearMap:
        return Scaled(map_of(self.map), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        y: Tensor = self.scale * self.map(x)
        return y if self.offset is None else y + self.offset


class BlocksHost(Host):
    """A grid of hosts, block (i, j) as child "i.j"."""

    def __init__(self, map_: Blocks, bias: Tensor | None = None) -> None:
        super().__init__(map_.shape)
        for i, row in enumerate(map_.grid):
            self.add_module(str(i), nn.ModuleList(host(block) for block in row))
        self.register_parameter("bias", _parameter(bias))

    def held_map(self) -> LinearMap:
        return Blocks(tuple(tuple(map_of(block) for block in row.children()) for row in self.children()))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        rows = [list(row.children()) for row in self.children()]
        pieces = x.split([cast(Host, block).in_features for block in rows[0]], dim=-1)
        y = torch.cat([torch.stack([b(p) for b, p in zip(row, pieces, strict=True)]).sum(0) for row in rows], dim=-1)
        return y if self.offset is None else y + self.offset


class InterleavedHost(DecodingHost):
    """The maps as children "0", "1", ..., whose each row is as a buffer; the order that spells is remembered until it
    changes.
    """

    which: Tensor

    def __init__(self, map_: Interleaved, bias: Tensor | None = None) -> None:
        super().__init__(map_)
        _add_children(self, map_.maps)
        self.register_buffer("which", map_.which)
        self.register_parameter("bias", _parameter(bias))
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def held_map(self) -> LinearMap:
        return Interleaved(tuple(map_of(child) for child in self.children()), self.which)

    def structured(self, x: Tensor) -> Tensor:
        y = torch.cat([child(x) for child in self.children()], dim=-1).index_select(-1, self.order())
        return y if self.offset is None else y + self.offset

    def select(self, rows: Tensor) -> Tensor:
        """Return some rows of matrices of codes: indices (...) int -> (..., n)."""
        return cast(Interleaved, self.held_map()).select(rows, self.order())

    def order(self) -> Tensor:
        """Return where each row is found among the rows of all maps, one map after the other, (m,) int32."""
        if torch.compiler.is_compiling() or self.which.is_inference():
            return interleaving(self.which)
        state = self.which.data_ptr(), self.which._version
        if self._order is None or self._order[0] != state:
            self._order = state, interleaving(self.which)
        return self._order[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the remembered order out of copies."""
        return {**super().__getstate__(), "_order": None}


class BitmapHost(DecodingHost):
    """The values as a parameter, the bits as a buffer; the indices they spell are remembered until the bits change."""

    bits: Tensor

    def __init__(self, map_: Bitmap, bias: Tensor | None = None) -> None:
        super().__init__(map_)
        self.nonzeros = map_.nonzeros
        self.register_parameter("values", _parameter(map_.values))
        self.register_buffer("bits", map_.bits)
        self.register_parameter("bias", _parameter(bias))
        self._rows: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def held_map(self) -> LinearMap:
        return Bitmap(cast(Tensor, self.values), self.bits, self.in_features, self.nonzeros)

    def structured(self, x: Tensor) -> Tensor:
        values = cast(Tensor, self.values)
        if by_compressed_rows(x, values):
            y = multiply_compressed_rows(x, values.flatten(), *self._compressed_rows())
        else:
            y = self.held_map()(x)
        return y if self.offset is None else y + self.offset

    def _compressed_rows(self) -> tuple[Tensor, Tensor]:
        state = self.bits.data_ptr(), self.bits._version
        if self._rows is None or self._rows[0] != state:
            self._rows = state, compressed_rows(self.bits, self.in_features)
        return self._rows[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the remembered indices out of copies."""
        return {**super().__getstate__(), "_rows": None}


class QuantizedHost(DecodingHost):
    """The codes as a buffer; scales, zero points and levels as parameters."""

    codes: Tensor

    def __init__(self, map_: Quantized, bias: Tensor | None = None) -> None:
        super().__init__(map_)
        self.width, self.bits, self.group_size, self.axis = map_.width, map_.bits, map_.group_size, map_.axis
        self.register_buffer("codes", map_.codes)
        for name in ("scale", "zero", "levels"):
            self.register_parameter(name, _parameter(getattr(map_, name)))
        self.register_parameter("bias", _parameter(bias))

    def held_map(self) -> LinearMap:
        own = self._parameters
        tensors = cast(Tensor, own["scale"]), own["zero"], own["levels"]
        return Quantized(self.codes, *tensors, self.width, self.bits, self.group_size, self.axis)

    def structured(self, x: Tensor) -> Tensor:
        y = self.held_map()(x)
        return y if self.offset is None else y + self.offset


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
                plain = not isinstance(value, tuple) or all(isinstance(item, int) for item in value)
                require(plain, operation, f"a tuple {name!r}", "whole numbers, a Sum or a Product")
                self._static[name] = value
        self.register_parameter("bias", _parameter(bias))

    def held_map(self) -> LinearMap:
        values = {name: getattr(self, name) for name in self._fields if name not in self._static}
        held = {name: map_of(v) if isinstance(v, nn.Module) else v for name, v in values.items()}
        return self._type(**held, **self._static)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        y = self.held_map()(x)
        return y if self.offset is None else y + self.offset


HOSTS: dict[type[LinearMap], type[Host]] = {
    LowRank: LowRankHost,
    Pivoted: PivotedHost,
    Bitmap: BitmapHost,
    Quantized: QuantizedHost,
    Sum: SumHost,
    Product: ProductHost,
    Scaled: ScaledHost,
    Blocks: BlocksHost,
    Interleaved: InterleavedHost,
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

    Accepts hosts, `nn.Linear`, the transposed `Conv1D` of GPT-2 in transformers, and convolutions in one group, whose
    map is that of their patches (hosts/convolution.py).

    Raises:
        EckartError: for any other module, such as a factor wrapped by an adapter that is not merged yet.
    """
    if isinstance(module, Host):
        return module.held_map()
    if isinstance(module, nn.Linear):
        return Dense(module.weight)
    if is_conv1d(module):
        return Dense(cast(Tensor, module.weight).mT)
    if is_convolution(module) and module.groups == 1:
        return Dense(cast(Tensor, module.weight).flatten(1))
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


def is_convolution(module: nn.Module) -> bool:
    """Tell whether a module is a plain convolution of one, two or three axes."""
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def leaf(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return an `nn.Linear` around existing tensors, without initializing anything."""
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = cast(nn.Parameter, _parameter(weight))
    if bias is not None:
        made.bias = cast(nn.Parameter, _parameter(bias))
    return made


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor)


def _add_children(module: nn.Module, maps: tuple[LinearMap, ...]) -> None:
    for i, map_ in enumerate(maps):
        module.add_module(str(i), host(map_))
