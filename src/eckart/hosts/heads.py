"""Attention heads inside a block: which rows are queries, keys and values of which head, found by trying, not by name.

    outputs of head j at token t:  sum_s softmax_s( q_jt R_(t-s) k_gs ) v_gs,   g the key's head that j shares

Two facts are tried on random queries, keys and values. A channel (a pair of channels, where positions rotate pairs R)
may be left out of a head's scores if it is the same to silence it in the queries or in the keys. Values may be changed
linearly inside a head if the outputs change by the same matrix. A norm of single queries or keys, or anything else
between the layers that is not attention, breaks one of the two.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.hosts.anatomy import linear_layers
from eckart.hosts.host import map_of

SINGLE, HALVES, NEIGHBOURS = "single", "halves", "neighbours"
# Two results are the same if they differ by less than this share of what a change did to them.
ALIKE = 1e-3


@dataclass(frozen=True, slots=True)
class Heads:
    """The layers around the heads of one attention, by name inside their block.

    Attributes:
        into: the layers of queries, keys and values; or one that holds their rows in this order.
        out_of: the layer that reads the outputs of all heads.
        size: channels per head.
        queries: heads of queries.
        keys: heads of keys and values; each serves queries // keys heads of queries, in order.
        rotated: channels that belong together in a score: "single" ones, pairs from the two "halves" of a head, or
            pairs of "neighbours".
    """

    into: tuple[str, ...]
    out_of: str
    size: int
    queries: int
    keys: int
    rotated: str = SINGLE

    @property
    def units(self) -> Tensor:
        """The channels of a head that are kept or dropped together, (size, 1) or (size / 2, 2) int64."""
        channels = torch.arange(self.size)
        if self.rotated == SINGLE:
            return channels[:, None]
        return channels.view(2, -1).mT if self.rotated == HALVES else channels.view(-1, 2)

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of queries, of keys and of values."""
        return self.queries * self.size, self.keys * self.size, self.keys * self.size


def head_sizes(config: Any) -> tuple[int, int, int]:
    """Return channels per head, heads of queries and heads of keys, as a config of transformers says; zeros if not."""
    queries = int(getattr(config, "num_attention_heads", None) or 0)
    keys = int(getattr(config, "num_key_value_heads", None) or queries)
    size = getattr(config, "head_dim", None) or int(getattr(config, "hidden_size", None) or 0) // max(queries, 1)
    return (int(size), queries, keys) if keys and queries % keys == 0 else (0, 0, 0)


@torch.no_grad()
def heads_of(block: nn.Module, run: Callable[[], Tensor], size: int, queries: int, keys: int) -> Heads | None:
    """Find the attention of a block, if its heads may have fewer channels.

    Args:
        block: the block, resident.
        run: runs it on a fixed input of several tokens and returns its output (1, t, d).
        size: channels per head, as the model's config says.
        queries: heads of queries.
        keys: heads of keys and values.
    """
    layers = linear_layers(block)
    _, outputs, _ = _watched(layers, run, {})
    order = list(outputs)
    for reader in order:
        if map_of(layers[reader]).shape[1] != queries * size:
            continue
        for into in _candidates(layers, order[: order.index(reader)], Heads((), reader, size, queries, keys)):
            for rotated in (SINGLE, HALVES, NEIGHBOURS):
                heads = Heads(into, reader, size, queries, keys, rotated)
                if (rotated == SINGLE or size % 2 == 0) and _is_attention(layers, run, heads, outputs):
                    return heads
    return None


def _candidates(layers: dict[str, nn.Module], before: list[str], heads: Heads) -> list[tuple[str, ...]]:
    """Return what may write queries, keys and values: the layer right before their reader, or the three before it."""

    def heights(names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(map_of(layers[name]).shape[0] for name in names)

    out: list[tuple[str, ...]] = [(name,) for name in before[-1:] if heights((name,)) == (sum(heads.rows),)]
    return out + [names for names in itertools.permutations(before[-3:], 3) if heights(names) == heads.rows]


def _is_attention(
    layers: dict[str, nn.Module], run: Callable[[], Tensor], heads: Heads, outputs: dict[str, Tensor]
) -> bool:
    """Tell whether layers write queries, keys and values of some heads whose outputs another reads."""
    generator = torch.Generator().manual_seed(0)
    like = outputs[heads.out_of]
    leading = like.shape[:-1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    q, k, v = (normal(*leading, count, heads.size) for count in (heads.queries, heads.keys, heads.keys))
    shared = heads.queries // heads.keys
    kept = torch.zeros(heads.keys, heads.size)
    for head in kept:  # different units in every head, half of them
        head[heads.units[torch.randperm(len(heads.units), generator=generator)[::2]].flatten()] = 1
    kept = kept.to(like)
    change = normal(heads.keys, heads.size, heads.size)

    def attended(q: Tensor, k: Tensor, v: Tensor, **pinned: Tensor) -> tuple[Tensor, Tensor]:
        rows = [part.flatten(-2) for part in (q, k, v)]
        parts = rows if len(heads.into) == 3 else [torch.cat(rows, -1)]
        inputs, _, out = _watched(layers, run, dict(zip(heads.into, parts, strict=True)) | pinned)
        return inputs[heads.out_of].reshape(*leading, heads.queries, heads.size), out

    plain, out = attended(q, k, v)
    by_query, _ = attended(q * kept.repeat_interleave(shared, 0), k, v)
    by_key, _ = attended(q, k * kept, v)
    expected = torch.einsum("...hc,hdc->...hd", plain, change.repeat_interleave(shared, 0))
    by_value, _ = attended(q, k, torch.einsum("...hc,hdc->...hd", v, change))
    # nothing else in the block may read them
    _, alone = attended(q, -k, -v, **{heads.out_of: outputs[heads.out_of]})
    _, again = attended(q, k, v, **{heads.out_of: outputs[heads.out_of]})
    return (
        float((by_query - plain).norm()) > ALIKE * float(plain.norm())
        and float((by_query - by_key).norm()) < ALIKE * float((by_query - plain).norm())
        and float((by_value - expected).norm()) < ALIKE * float((expected - plain).norm())
        and torch.equal(alone, again)
        and not torch.equal(out, again)
    )


def _watched(
    layers: dict[str, nn.Module], run: Callable[[], Tensor], pinned: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Run a block with the outputs of some layers as given; return inputs and outputs by layer, and its own output."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            inputs[name] = args[0].clone()
            outputs[name] = pinned[name].reshape(out.shape).to(out.dtype) if name in pinned else out.clone()
            return outputs[name]

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        out = run()
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs, out
