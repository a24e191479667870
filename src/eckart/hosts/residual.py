"""Who reads from the residual stream of a block and who writes to it, seen from one run.

A norm reads the stream; the linear layers that are given its very output read through it; linear layers of the stream's
width that do not read write to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.hosts.anatomy import linear_layers
from eckart.hosts.host import map_of


@dataclass(frozen=True, slots=True)
class Residual:
    """The layers of a block around its residual stream, by name inside the block.

    Attributes:
        norms: norms without mean or bias (RMSNorm) over the stream's width.
        readers: linear layer -> the norm whose output it is given.
        writers: linear layers whose outputs are added to the stream.
    """

    norms: tuple[str, ...]
    readers: dict[str, str]
    writers: tuple[str, ...]


def is_rms_norm(module: nn.Module, width: int) -> bool:
    """Tell whether a module is, by its class's name and its one parameter, an RMSNorm of a width."""
    shapes = [tuple(p.shape) for p in module.parameters()]
    return type(module).__name__.endswith("RMSNorm") and shapes == [(width,)]


@torch.no_grad()
def residual_of(block: nn.Module, run: Callable[[], Tensor]) -> Residual:
    """Find the layers around a block's residual stream.

    Args:
        block: the block (or a whole model's end), resident.
        run: runs it and returns its output (1, t, d).
    """
    linear, outputs, inputs = linear_layers(block), dict[str, Tensor](), dict[str, Tensor]()
    watched = {name: module for name, module in block.named_modules() if name in linear or not list(module.children())}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                inputs[name], outputs[name] = args[0], out

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in watched.items()]
    try:
        width = run().shape[-1]
    finally:
        for handle in handles:
            handle.remove()
    norms = tuple(name for name in outputs if is_rms_norm(watched[name], width))
    readers = {name: norm for name in linear for norm in norms if name in inputs and inputs[name] is outputs[norm]}
    writers = tuple(name for name in linear if name not in readers and map_of(linear[name]).shape[0] == width)
    return Residual(norms, readers, writers)


def rotated(name: str, tensor: Tensor, parts: Residual, norms: dict[str, Tensor], basis: Tensor) -> Tensor:
    """Return a parameter of a block whose residual stream is written in another basis.

    Args:
        name: its name inside the block.
        tensor: its value.
        parts: the layers around the stream.
        norms: the norms' weights by name, (d,).
        basis: Q (d, d'), orthonormal columns.

    Returns:
        Norm weights become sqrt(d / d'), since d' coordinates have about the length of d; readers W diag(g) Q, writers
        Q^T W; float64 where changed.
    """
    layer, _, kind = name.rpartition(".")
    width, kept = basis.shape
    if layer in parts.norms:
        return basis.new_full((kept,), (width / kept) ** 0.5)
    if layer in parts.readers and kind == "weight":
        return (tensor.double() * norms[parts.readers[layer]].double()) @ basis
    if layer in parts.writers:
        return basis.mT @ tensor.double()
    return tensor
