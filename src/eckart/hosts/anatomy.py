"""What a transformer is made of, found by structure, not by model class: blocks, embedding, head, linear layers."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts.base import Host
from eckart.hosts.host import is_linear

# Narrower linear layers (routers, gates, scalar heads) carry decisions rather than features; they are left alone.
NARROW = 10


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a decoder or encoder, by module name.

    Attributes:
        blocks: the repeated blocks, in order.
        embedding: the token embedding, or None if it is not a plain `nn.Embedding`.
        head: the output projection to the vocabulary, or None.
        tied: whether head and embedding are one matrix.
    """

    blocks: tuple[str, ...]
    embedding: str | None
    head: str | None
    tied: bool


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a Hugging Face decoder or encoder.

    Args:
        model: a `PreTrainedModel`, on any device, meta included.

    Raises:
        EckartError: if no list of equal blocks is found, or two (an encoder-decoder).
    """
    lists = _block_lists(model)
    if not lists:
        raise EckartError(f"{type(model).__name__} has no list of equal blocks holding linear layers to work through")
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in lists}
    largest = max(lists, key=lambda name: sizes[name])
    rivals = [name for name in lists if name != largest and sizes[name] > 0.2 * sizes[largest]]
    if rivals:
        raise EckartError(
            f"{type(model).__name__} has several stacks of blocks ({', '.join([largest, *rivals])}); "
            "only decoders and encoders with one stack are supported"
        )
    blocks = tuple(f"{largest}.{i}" for i in range(len(lists[largest])))
    embedding, head = _named(model, "get_input_embeddings"), _named(model, "get_output_embeddings")
    if embedding and type(model.get_submodule(embedding)) is not nn.Embedding:
        embedding = None
    if head and type(model.get_submodule(head)) is not nn.Linear:
        head = None
    tied = bool(embedding and head) and _weight(model, cast(str, head)) is _weight(model, cast(str, embedding))
    return Anatomy(blocks, embedding, head, tied)


def linear_layers(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the dense linear layers inside a module by full name, in definition order.

    Args:
        module: any module, for instance one block.
        prefix: the module's own name.
    """
    out = {}
    for name, child in module.named_modules():
        if is_linear(child) and min(cast(Tensor, child.weight).shape) > NARROW:
            out[f"{prefix}.{name}" if prefix and name else prefix or name] = child
    return out


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in place of the one of that name, in the same mode, and return the one it replaced."""
    old = model.get_submodule(name)
    model.set_submodule(name, module.train(old.training))
    return old


def _weight(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name).weight


def _named(model: nn.Module, getter: str) -> str | None:
    """Return the name of the module that a getter of transformers returns, if there is one."""
    get = getattr(model, getter, None)
    found = get() if get is not None else None
    if found is None:
        return None
    return next((name for name, module in model.named_modules() if module is found), None)


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost `nn.ModuleList`s of one class of block holding linear layers."""
    out: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in out)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            same = len({type(block) for block in module}) == 1
            if same and any(_is_matrix(m) for m in module[0].modules()) and not _is_matrix(module[0]):
                out[name] = module
    return out


def _is_matrix(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, dense or of any structure."""
    return is_linear(module) or isinstance(module, Host)
