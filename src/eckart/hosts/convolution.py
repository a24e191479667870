"""Convolutions as linear maps of patches, and adapters on them.

    y_t = W p_t + b        p_t the patch of x that output position t sees, (c k_1 k_2 ...); W (m, c k_1 k_2 ...)

So whatever is composed with a linear layer can be composed with a convolution. What is added to it runs as convolutions
itself, without writing patches out, where its structure allows it:

    low rank U V: r kernels of V, then U at every position
    Tucker: the factor of the channels at every position, a small kernel, the factor of the outputs at every position
    A (x) B: A over channels at every position, then the kernels of B channel by channel
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.hosts.adapted import AdaptedHost
from eckart.hosts.adapter import Inner, Plus
from eckart.hosts.host import is_convolution, map_of
from eckart.maps import Dense, Kronecker, LinearMap, LowRank, Product, Scaled, Sum, Tucker

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AdaptedConvolution(AdaptedHost):
    """A convolution with named adapters: x (b, c, ...) -> y (b, m, ...)."""

    def hosted(self, map_: LinearMap, offset: Tensor | None) -> nn.Module:
        """Return a convolution like the base with another kernel and bias."""
        base, weight = self.base, map_.dense().view_as(cast(Tensor, self.base.weight)).contiguous()
        new: dict[int, Any] = {id(base.weight): nn.Parameter(weight)}
        if offset is not None:
            new[id(base.bias)] = nn.Parameter(offset.clone())
        return copy.deepcopy(base, new)

    def with_adapters(self, x: Tensor, weights: Mapping[str, float], sequences: Tensor | None = None) -> Tensor:
        if not weights:
            return cast(Tensor, self.base(x))
        chain = [(self.adapter(name), weight) for name, weight in weights.items()]
        changes = [(change, weight) for adapter, weight in chain for change in adapter.chain()]
        if all(type(change) is Plus for change, _ in changes):
            y: Tensor = self.base(x)
            for change, weight in changes:
                y = y + weight * self._added(cast(Plus, change), x)
            return y
        base = map_of(self.base)
        current = Inner(base, lambda: base, sequences=sequences)
        for adapter, weight in chain:
            current = adapter.within(current, weight)
        y = current.call(patches(x, self.base))
        return (y if self.offset is None else y + self.offset).movedim(-1, -len(kernel_axes(self.base)))

    def _added(self, change: Plus, x: Tensor) -> Tensor:
        """Return s D p for the patches p of x."""
        factors = change.factors()
        delta = map_of(change.delta) if factors is None else LowRank(*factors)
        seen = x if change.dropout is None else change.dropout(x)
        return change.scale * convolved(delta.to(x.dtype), seen, self.base)


def adapted_host(module: nn.Module) -> AdaptedHost:
    """Return the layer that adapters go on, around a linear layer or a convolution."""
    return AdaptedConvolution(module) if is_convolution(module) else AdaptedHost(module)


def kernel_axes(conv: nn.Module) -> tuple[int, ...]:
    """Return the sizes of a kernel besides that of its outputs: (c, k_1, ...)."""
    return tuple(cast(Tensor, conv.weight).shape[1:])


def convolved(map_: LinearMap, x: Tensor, conv: nn.Module) -> Tensor:
    """Return what a map makes of the patches that a convolution sees, without writing them out where that is possible.

    Args:
        map_: W (m, c k_1 k_2 ...).
        x: inputs (b, c, ...).
        conv: an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` in one group, whose stride, padding and dilation count.
    """
    channels, *kernel = kernel_axes(conv)
    match map_:
        case Dense(weight):
            return _convolve(x, weight.view(-1, channels, *kernel), conv)
        case LowRank(up, down):
            return _everywhere(Dense(up), convolved(Dense(down), x, conv), conv)
        case Product((*outer, last)):
            y = convolved(last, x, conv)
            for factor in reversed(outer):
                y = _everywhere(factor, y, conv)
            return y
        case Scaled(inner, scale):
            return scale * convolved(inner, x, conv)
        case Sum(maps):
            return torch.stack([convolved(one, x, conv) for one in maps]).sum(0)
        case Tucker(heights=(_,), widths=(_, *sizes)) if sizes == kernel:
            core, (up,), (down, *others) = map_.parts()
            for one in others:  # each takes its axis from the front of the kernel and puts it behind all others
                core = torch.tensordot(core, one.to(core.dtype), dims=([2], [1]))  # autocast narrows one of them
            return _everywhere(Dense(up), _convolve(_everywhere(Dense(down.mT), x, conv), core, conv), conv)
        case Kronecker(left, right) if left.shape[2] == channels:
            return _channelwise(left, right, x, conv)
        case _:
            return map_(patches(x, conv)).movedim(-1, -1 - len(kernel))


def _channelwise(left: Tensor, right: Tensor, x: Tensor, conv: nn.Module) -> Tensor:
    """Return sum_r A_r (x) B_r of patches: A (r, p, c), B (r, q, k_1 k_2 ...)."""
    _, *kernel = kernel_axes(conv)
    (terms, p, _), q = left.shape, right.shape[1]
    mixed = _everywhere(Dense(left.flatten(0, 1)), x, conv)
    kernels = right[:, None].expand(-1, p, -1, -1).reshape(terms * p * q, 1, *kernel)
    y = _convolve(mixed, kernels, conv, groups=terms * p)
    axis = y.ndim - 1 - len(kernel)
    return cast(Tensor, y.unflatten(axis, (terms, p * q)).sum(axis))


def _everywhere(map_: LinearMap, y: Tensor, conv: nn.Module) -> Tensor:
    """Apply a map to the channels at every position: y (b, k, ...)."""
    axis = -len(kernel_axes(conv))
    # contiguous: of other tensors torch multiplies and rounds otherwise once the weight does not train
    return map_(y.movedim(axis, -1).contiguous()).movedim(-1, axis)


def _convolve(x: Tensor, kernel: Tensor, conv: nn.Module, groups: int = 1) -> Tensor:
    """Convolve with another kernel (m, c / groups, ...) as a convolution does with its own."""
    module = cast(nn.Conv2d, conv)
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = _padded(x, conv), (0,) * len(module.kernel_size)
    run = cast(Callable[..., Tensor], CONVOLVE[len(module.kernel_size)])
    return run(x, kernel, None, module.stride, padding, module.dilation, groups)


def _padded(x: Tensor, conv: nn.Module) -> Tensor:
    module = cast(nn.Conv2d, conv)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def patches(x: Tensor, conv: nn.Module) -> Tensor:
    """Return what every output position of a convolution sees: x (b, c, ...) -> (b, ..., c k_1 k_2 ...)."""
    module = cast(nn.Conv2d, conv)
    axes = len(module.kernel_size)
    first = x.ndim - axes
    x = _padded(x, conv)
    for axis, (size, step, spread) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(first + axis, (size - 1) * spread + 1, step)[..., ::spread]
    return x.movedim(first - 1, -axes - 1).flatten(-axes - 1)
