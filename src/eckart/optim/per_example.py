"""Gradients of every example of a batch, clipped one by one, from one backward pass.

For a linear map the gradient of example i is a product of what comes in and what comes back, no more:

    y_i = W x_i + b:          dW_i = g_i^T x_i          db_i = sum_t g_ti
    y_i = .. + s B A x_i:     dB_i = s g_i^T (x_i A^T)          dA_i = s (g_i B)^T x_i

so its norm comes from both, the smaller way around: |G^T H|_F^2 = <G G^T, H H^T>. The clipped sum is one product again,
sum_i c_i g_i^T h_i. No gradient of a single example is kept.

Legend: x (batch, tokens, n), g = dL/dy (batch, tokens, m), h either side's factor, c (batch,) factors.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.hosts import AdaptedHost, is_convolution
from eckart.hosts.adapter import Plus
from eckart.hosts.convolution import patches

# A trained parameter, and a way to (left, right) of its gradient left^T right from x and g.
_Parts = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class _Seen:
    """What a layer saw in one pass: its inputs, and once backward ran, the gradient of its outputs."""

    inputs: Tensor
    gradient: Tensor | None = None


def clipped_gradients(
    model: nn.Module, losses: Callable[[], Tensor], clip: float
) -> tuple[dict[Tensor, Tensor], Tensor]:
    """Return the sum of the examples' clipped gradients, for every parameter that trains, and their norms before.

    Args:
        model: what trains of it must be low-rank changes of adapted layers, or whole linear layers.
        losses: runs the model once and returns one loss per example, (batch,); examples must not see each other.
        clip: largest norm of an example's gradient over all parameters together.

    Raises:
        EckartError: if something else trains, or a layer is used more than once in a pass.
    """
    watched = dict(_watched(model))
    with _recorded(watched) as seen:
        values = losses()
        if values.ndim != 1:
            raise EckartError(f"losses must be one number per example, got shape {tuple(values.shape)}")
        values.sum().backward()
    with torch.no_grad():
        return _clipped(watched, seen, len(values), clip)


def _clipped(
    watched: Mapping[nn.Module, list[tuple[Tensor, _Parts]]], seen: Mapping[nn.Module, _Seen], count: int, clip: float
) -> tuple[dict[Tensor, Tensor], Tensor]:
    """Return the clipped sums and the norms from what the layers saw."""
    factors = []
    for module, wanted in watched.items():
        for parameter, parts in wanted:
            parameter.grad = None
            of = seen.get(module)
            if of is not None and of.gradient is not None:
                left, right = parts(of.inputs, of.gradient)
                factors.append((parameter, _by_example(left, count), _by_example(right, count)))
    squares = torch.zeros(count, dtype=torch.float64)
    for _, left, right in factors:
        squares = squares.to(left.device) + _square_norms(left, right).double()
    norms = squares.sqrt()
    scale = (clip / norms.clamp_min(1e-12)).clamp_max(1.0)
    sums = {p: torch.zeros_like(p) for wanted in watched.values() for p, _ in wanted}
    for parameter, left, right in factors:
        scaled = left * scale.to(left.dtype)[:, None, None]
        sums[parameter] += (scaled.flatten(0, 1).mT @ right.flatten(0, 1)).view_as(parameter)
    return sums, norms


def _watched(model: nn.Module) -> Iterator[tuple[nn.Module, list[tuple[Tensor, _Parts]]]]:
    """Yield the modules that hold what trains, and the gradients of its parameters."""
    known: set[int] = set()
    for name, module in model.named_modules():
        if module.training and _mixes(module):
            raise EckartError(
                f"{name} ({type(module).__name__}) lets examples of a batch see each other; gradients by example need "
                "layers that do not"
            )
        wanted: list[tuple[Tensor, _Parts]] = []
        if isinstance(module, AdaptedHost):
            wanted = _of_adapted(name, module)
        elif isinstance(module, nn.Linear) and not known.intersection(map(id, module.parameters())):
            wanted = _of_linear(module)
        if wanted:
            known.update(id(parameter) for parameter, _ in wanted)
            yield module, wanted
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (id(parameter) not in known or holders[id(parameter)] > 1):
            raise EckartError(
                f"{name} trains, whose gradient by example is not known; low-rank changes and linear layers may train, "
                "where nothing else has the same weights"
            )


def _mixes(module: nn.Module) -> bool:
    """Tell whether what a module computes for an example in training depends on the others of the batch."""
    if isinstance(module, AdaptedHost):  # shortcuts choose what is computed from the whole batch
        return any(module.adapter(name).shortcut is not None for name in module.active)
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _of_linear(module: nn.Linear) -> list[tuple[Tensor, _Parts]]:
    out: list[tuple[Tensor, _Parts]] = []
    if module.weight.requires_grad:
        out.append((module.weight, lambda x, g: (g, x)))
    if module.bias is not None and module.bias.requires_grad:
        out.append((module.bias, lambda x, g: (g, g.new_ones(*g.shape[:-1], 1))))
    return out


def _of_adapted(name: str, module: AdaptedHost) -> list[tuple[Tensor, _Parts]]:
    """Return the trained factors of the one low-rank change that is active on a layer."""
    if not any(p.requires_grad for adapter in module.active for p in module.adapter(adapter).parameters()):
        return []
    changes = [change for adapter in module.active for change in module.adapter(adapter).chain()]
    change = changes[0]
    pair = change.factors() if isinstance(change, Plus) else None
    weight = next(iter(module.active.values()))
    if len(changes) != 1 or not isinstance(change, Plus) or change.rule or change.dropout or pair is None:
        raise EckartError(f"{name} has more than one plain low-rank change; gradients by example know only that")
    up, down = pair
    scale = change.scale * weight

    def into(x: Tensor) -> Tensor:
        return patches(x, module.base) if is_convolution(module.base) else x

    def out_of(g: Tensor) -> Tensor:
        return g.movedim(1, -1) if is_convolution(module.base) else g

    out: list[tuple[Tensor, _Parts]] = []
    if up.requires_grad:
        out.append((up, lambda x, g: (scale * out_of(g), F.linear(into(x), down.to(x.dtype)))))
    if down.requires_grad:
        out.append((down, lambda x, g: (scale * F.linear(out_of(g), up.mT.to(g.dtype)), into(x))))
    return out


@contextmanager
def _recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, _Seen]]:
    """Remember inputs and gradients of outputs of modules inside the `with`."""
    seen: dict[nn.Module, _Seen] = {}

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module in seen:
            raise EckartError(f"a {type(module).__name__} runs twice in a pass; gradients by example know one use only")
        seen[module] = mine = _Seen(inputs[0].detach())
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(mine, "gradient", gradient.detach()))

    handles = [module.register_forward_hook(forward) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _by_example(factor: Tensor, count: int) -> Tensor:
    """Return a factor as (batch, tokens, size), float32 or wider."""
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    if wide.shape[0] != count:
        raise EckartError(
            f"a layer saw {wide.shape[0]} rows for {count} examples; examples must come first in all layers"
        )
    return wide.reshape(count, -1, wide.shape[-1])


def _square_norms(left: Tensor, right: Tensor) -> Tensor:
    """Return |left_i^T right_i|_F^2 (batch,) by the smaller of both products."""
    tokens = left.shape[1]
    if tokens * tokens <= left.shape[2] * right.shape[2]:
        return ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
    return (left.mT @ right).square().sum((1, 2))
