"""Hidden units inside a block: which layers write them and which one reads them, found by trying, not by name.

In an MLP a unit is a row of the layers before the nonlinearity and a column of the one behind it, so that rows and
columns can be deleted together. A layer writes the units that another reads if a change of some of its output channels
at one token changes the other's input in those channels at that token only, and nothing else in the block but through
the other. (The channels of values and attention output correspond as well, but a change spreads to other tokens.)
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.hosts.anatomy import linear_layers, replace
from eckart.hosts.host import leaf, map_of, offset_of


@dataclass(frozen=True, slots=True)
class Neurons:
    """The layers around one set of hidden units, by name inside their block.

    Attributes:
        into: layers with a row per unit: gate and up, or the first of two.
        out_of: the layer with a column per unit.
    """

    into: tuple[str, ...]
    out_of: str


@torch.no_grad()
def neurons_of(block: nn.Module, run: Callable[[], Tensor]) -> list[Neurons]:
    """Find the sets of hidden units of a block whose number may be changed.

    Args:
        block: the block, resident.
        run: runs it on a fixed input of at least two tokens and returns its output (1, t, d).
    """
    layers = linear_layers(block)
    reference = _Run(layers, run)
    out = []
    for reader in reference.order:
        size = reference.inputs[reader].shape[-1]
        writers = tuple(
            name
            for name in reference.order[: reference.order.index(reader)]
            if map_of(layers[name]).shape[0] == size and _writes(layers, run, reference, name, reader)
        )
        group = Neurons(writers, reader)
        if writers and _narrows(block, layers, run, group):
            out.append(group)
    return out


class _Run:
    """One run of a block: inputs of its layers in execution order, and what comes out.

    Args:
        layers: the layers, by name.
        run: runs the block.
        changed: name of a layer, and a change of its output.
        pinned: name of a layer, and its output whatever its input.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        run: Callable[[], Tensor],
        changed: tuple[str, Callable[[Tensor], Tensor]] | None = None,
        pinned: tuple[str, Tensor] | None = None,
    ) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
            def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
                self.inputs[name] = args[0].clone()
                if changed is not None and changed[0] == name:
                    out = changed[1](out)
                if pinned is not None and pinned[0] == name:
                    out = pinned[1]
                self.outputs[name] = out.clone()
                return out

            return after

        handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
        try:
            self.out = run()
        finally:
            for handle in handles:
                handle.remove()
        self.order = list(self.inputs)


def _writes(layers: dict[str, nn.Module], run: Callable[[], Tensor], before: _Run, writer: str, reader: str) -> bool:
    """Tell whether the reader's input channels are, token by token, functions of the writer's output channels alone."""

    def change(out: Tensor) -> Tensor:
        out = out.clone()
        out.reshape(-1, out.shape[-1])[0, ::2] += out.abs().mean() + 1
        return out

    after = _Run(layers, run, (writer, change), (reader, before.outputs[reader]))
    moved = (after.inputs[reader] != before.inputs[reader]).reshape(-1, before.inputs[reader].shape[-1])
    elsewhere = [name for name in before.order if name != reader]
    return (
        bool(moved[0, ::2].any())
        and not bool(moved[0, 1::2].any())
        and not bool(moved[1:].any())
        and all(torch.equal(after.inputs[name], before.inputs[name]) for name in elsewhere)
        and torch.equal(after.out, before.out)
    )


def _narrows(block: nn.Module, layers: dict[str, nn.Module], run: Callable[[], Tensor], group: Neurons) -> bool:
    """Tell whether the block also runs with fewer units, and what it gives is what fewer units give."""
    kept = torch.arange(0, map_of(layers[group.out_of]).shape[1], 2)
    names, originals = (*group.into, group.out_of), {}
    reader = layers[group.out_of]

    def silence(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        silent = torch.zeros_like(args[0])
        silent[..., kept] = args[0][..., kept]
        return (silent,)

    handle = reader.register_forward_pre_hook(silence)
    try:
        expected = run()
    finally:
        handle.remove()
    try:
        for name in names:
            originals[name] = replace(block, name, narrowed(layers[name], kept, columns=name == group.out_of))
        with contextlib.suppress(RuntimeError):  # a parameter of the units' number that is no layer's
            return torch.allclose(run(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        return False
    finally:
        for name, original in originals.items():
            replace(block, name, original)


def narrowed(layer: nn.Module, kept: Tensor, *, columns: bool) -> nn.Linear:
    """Return a linear layer with only some of its rows (or columns), as an `nn.Linear`."""
    weight, bias = map_of(layer).dense(), offset_of(layer)
    if columns:
        return leaf(weight[:, kept].contiguous(), bias)
    return leaf(weight[kept].contiguous(), None if bias is None else bias.detach()[kept].contiguous())
