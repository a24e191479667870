"""The sets of channels inside the blocks of a model in memory: hidden units of MLPs, heads of attentions."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eckart.errors import EckartError
from eckart.hosts.adapted import AdaptedHost
from eckart.hosts.anatomy import anatomy, linear_layers
from eckart.hosts.heads import Heads, head_sizes, heads_of
from eckart.hosts.host import map_of
from eckart.hosts.neurons import Neurons, neurons_of

# What an adapted layer calls its base.
BASE = ".base"


@torch.no_grad()
def channels_of(model: nn.Module) -> list[Neurons | Heads]:
    """Return the sets of channels of every block in order, with full names of the layers around them.

    A few tokens are run through the model; blocks with the same layers are tried once. Adapters are out of the way
    meanwhile, and everything is as it was afterwards.

    Args:
        model: a decoder or encoder of transformers with dense layers.

    Raises:
        EckartError: if it has no blocks, or is not called with tokens.
    """
    known: dict[tuple[tuple[str, tuple[int, int]], ...], list[Neurons | Heads]] = {}
    out: list[Neurons | Heads] = []
    with _plain(model):
        for name, (args, kwargs) in _calls(model).items():
            block = model.get_submodule(name)
            alike = tuple((inner, map_of(layer).shape) for inner, layer in linear_layers(block).items())
            if alike not in known:
                block = _wide(block)
                run = partial(_ran, block, args, kwargs)
                heads = heads_of(block, run, *head_sizes(_config(model)))
                known[alike] = [*([heads] if heads else []), *neurons_of(block, run)]
            out.extend(_named(found, name) for found in known[alike])
    return out


def _named(found: Neurons | Heads, block: str) -> Neurons | Heads:
    """Return a set with the full names of its layers."""

    def full(name: str) -> str:
        return f"{block}.{name.removesuffix(BASE)}"

    return replace(found, into=tuple(full(name) for name in found.into), out_of=full(found.out_of))


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if not getattr(text, "vocab_size", None):
        raise EckartError(f"{type(model).__name__} is no model of transformers that is called with tokens")
    return text


def _wide(block: nn.Module) -> nn.Module:
    """Return a block in float32 or wider, a copy if it is not: what is tried has to hold to a few digits."""
    narrow = any(p.is_floating_point() and p.element_size() < 4 for p in block.parameters())
    return copy.deepcopy(block).float() if narrow else block


def _calls(model: nn.Module) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments that each block is called with for a few tokens, by its name, in float32 or wider."""
    device, vocabulary = next(model.parameters()).device, int(_config(model).vocab_size)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def seen(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = pytree.tree_map_only(Tensor, _widened, (args, kwargs))

        return before

    blocks = anatomy(model).blocks
    handles = [
        model.get_submodule(name).register_forward_pre_hook(seen(name), prepend=True, with_kwargs=True)
        for name in blocks
    ]
    try:
        model(input_ids=torch.arange(8, device=device)[None] % vocabulary, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[name] for name in blocks}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def _ran(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    out = block(*args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, its adapters out of the way."""
    adapted = {layer: layer.active for layer in model.modules() if isinstance(layer, AdaptedHost)}
    modes = {module: module.training for module in model.modules()}
    try:
        for layer in adapted:
            layer.active = {}
        model.eval()
        yield
    finally:
        for layer, active in adapted.items():
            layer.active = active
        for module, mode in modes.items():
            module.training = mode
