"""Contextual sparsity: in training, a frozen layer computes only the channels that matter to the batch at hand.

    hidden units:  s_j = |phi(G x, U x)_j|          kept in the rows of G and U and the columns of the layer behind
    scores:        s_j = |(Q x)_j| |(K x)_j|        kept in the rows of queries and keys
    values:        s_j = |(V x)_j|                  kept in the rows of values and the columns of the layer behind

The lengths are taken over all tokens of the batch, on the best low-rank approximations of the layers. What is left out
of a product is zero in forward and backward; tokens that the loss is taken at leave nothing out. Which channels belong
together is found by trying (hosts/neurons.py, hosts/heads.py); phi is what stands between the layers of an MLP, a copy
of the module itself without its weights.

Legend: t tokens, r rank of the approximations, d channels of a head, g heads of queries per head of keys.
"""

import copy
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.hosts.adapter import Inner, Shortcut
from eckart.hosts.heads import Heads
from eckart.maps import sliced

# The label of a token that the loss is not taken at, as torch and transformers have it.
IGNORED = -100


class LowRankPredictor(nn.Module):
    """U V x + b, of buffers: it is no part of what a model saves or trains.

    Args:
        up: U (m, r).
        down: V (r, n).
        bias: b (m,), or None.
    """

    up: Tensor
    down: Tensor

    def __init__(self, up: Tensor, down: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        return F.linear(F.linear(x, self.down), self.up, cast("Tensor | None", self.bias))

    def lengths(self, x: Tensor) -> Tensor:
        """Return |y_j| over all tokens, (m,), from the Gram matrix of V x: nothing of size (t, m) is made."""
        hidden, up = F.linear(x, self.down).flatten(0, -2).float(), self.up.float()
        if self.bias is not None:
            hidden, up = F.pad(hidden, (0, 1), value=1.0), torch.cat([up, cast(Tensor, self.bias).float()[:, None]], 1)
        squares: Tensor = ((up @ (hidden.mT @ hidden)) * up).sum(1)
        return squares.clamp_min(0).sqrt()


class LossTokens:
    """The tokens that the loss of the batch at hand is taken at, which a model's `labels` tell before its layers run.

    Attributes:
        places: True for a token that is labelled or whose next one is, (b, t); None without labels of tokens.
    """

    def __init__(self) -> None:
        self.places: Tensor | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the arguments of a model: a hook before its forward pass."""
        labels = kwargs.get("labels")
        self.places = None
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            labelled = labels != IGNORED
            self.places = labelled | F.pad(labelled[:, 1:], (0, 1), value=False)


class Choice(nn.Module):
    """The channels that the layers around one set of them compute, chosen anew for every batch.

    The layers that write the channels are asked first, each with the same inputs, and the one that reads them behind.

    Args:
        reader: name of the layer that reads them.
        dense: passes of training that compute all channels first.
        whole: tokens that compute all channels in every pass, or None.

    Attributes:
        passes: passes of training so far, counted in backward, once for each however often checkpointing repeats its
            forward pass.
    """

    passes: Tensor

    def __init__(self, reader: str, dense: int, whole: LossTokens | None) -> None:
        super().__init__()
        self.reader, self.dense, self.whole = reader, dense, whole
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)
        self._seen: Callable[[], Tensor | None] = _nothing
        self._chosen: Mapping[str, Tensor] = {}

    @abstractmethod
    def choose(self, x: Tensor) -> Mapping[str, Tensor]:
        """Return the channels each layer computes, ascending, by its name, from the inputs of those that write them."""

    @torch.no_grad()
    def at(self, layer: str, x: Tensor, sequences: Tensor | None) -> Tensor | None:
        """Return the channels that a layer computes: rows of one that writes, columns of the one that reads.

        None stands for all. A pass is counted as the reader's inputs are differentiated.

        Args:
            layer: its name.
            x: its inputs.
            sequences: which sequences of the batch they are, or None for all.
        """
        if layer != self.reader and self._seen() is not x:
            self._seen = weakref.ref(x)
            whole = self.whole_of(x, sequences)
            skips = int(self.passes) >= self.dense and (whole is None or not bool(whole.all()))
            self._chosen = self.choose(x) if skips else {}
        return self._chosen.get(layer)

    def whole_of(self, x: Tensor, sequences: Tensor | None) -> Tensor | None:
        """Return where inputs (..., n) of these sequences compute all channels, (...) bool, or None for nowhere."""
        places = None if self.whole is None else self.whole.places
        if places is not None and sequences is not None:
            places = places[sequences.to(places.device)]
        return places if places is not None and places.shape == x.shape[:-1] else None

    def train(self, mode: bool = True) -> "Choice":
        """Stay in evaluation mode: nothing is dropped from a prediction."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the batch at hand out of copies."""
        return {**self.__dict__, "_seen": _nothing, "_chosen": {}}


def _nothing() -> None:
    return None


class UnitChoice(Choice):
    """Which hidden units of an MLP are computed.

    Args:
        writers: names of the layers before the nonlinearity.
        reader: name of the layer behind it.
        predict: x (..., n) -> predicted units (..., k).
        kept: units that are computed.
        dense: passes of training that compute all first.
        whole: tokens that compute all in every pass, or None.
    """

    def __init__(
        self, writers: Sequence[str], reader: str, predict: nn.Module, kept: int, dense: int, whole: LossTokens | None
    ) -> None:
        super().__init__(reader, dense, whole)
        self.writers, self.predict, self.kept = tuple(writers), predict.eval(), kept

    def choose(self, x: Tensor) -> Mapping[str, Tensor]:
        units = self.predict(x).flatten(0, -2)
        wide = torch.promote_types(units.dtype, torch.float32)
        chosen = _largest(torch.linalg.vector_norm(units, dim=0, dtype=wide), self.kept)
        return dict.fromkeys((*self.writers, self.reader), chosen)


class HeadChoice(Choice):
    """Which channels of queries, keys and values are computed; shared keys and values choose for all their heads.

    Args:
        heads: the layers of the attention, by full name.
        predict: predictors of queries, keys and values.
        kept: channels that are computed, of all of the keys'.
        dense: passes of training that compute all first.
        whole: tokens that compute all in every pass, or None.
    """

    def __init__(
        self, heads: Heads, predict: Sequence[LowRankPredictor], kept: int, dense: int, whole: LossTokens | None
    ) -> None:
        super().__init__(heads.out_of, dense, whole)
        self.heads, self.predict, self.kept = heads, nn.ModuleList(predict), kept

    def choose(self, x: Tensor) -> Mapping[str, Tensor]:
        heads = self.heads
        q, k, v = (cast(LowRankPredictor, one).lengths(x) for one in self.predict)
        shared = q.view(heads.keys, -1, heads.size).mean(1).flatten()
        scores, values = _largest(shared * k, self.kept), _largest(v, self.kept)
        queries, outputs = self._of_queries(scores), self._of_queries(values)
        rows = queries, scores, values
        if len(heads.into) == 1:
            starts = 0, heads.rows[0], heads.rows[0] + heads.rows[1]
            return {heads.into[0]: torch.cat([r + s for r, s in zip(rows, starts, strict=True)]), self.reader: outputs}
        return {**dict(zip(heads.into, rows, strict=True)), self.reader: outputs}

    def _of_queries(self, channels: Tensor) -> Tensor:
        """Return the channels of queries (or outputs) that belong to channels of keys (or values), ascending."""
        size, count = self.heads.size, self.heads.queries // self.heads.keys
        first = channels // size * (size * count) + channels % size
        every = first[:, None] + size * torch.arange(count, device=channels.device)
        return every.flatten().sort().values


def _largest(lengths: Tensor, count: int) -> Tensor:
    return lengths.topk(count, sorted=False).indices.sort().values


class Sliced(Shortcut):
    """W with only the chosen channels of one side.

    Args:
        layer: name of the layer.
        choice: of the channels, shared by all layers that have them.
    """

    def __init__(self, layer: str, choice: Choice) -> None:
        super().__init__()
        self.layer, self.choice = layer, choice

    def around(self, inner: Inner) -> Inner:
        return Inner(lambda x: self.multiply(x, inner), inner.map, sequences=inner.sequences)

    def multiply(self, x: Tensor, inner: Inner) -> Tensor:
        """Return W x (..., m) with the channels that are left out of W being zero: x (..., n)."""
        places, writes = self.choice.at(self.layer, x, inner.sequences), self.layer != self.choice.reader
        if not writes and torch.is_grad_enabled() and x.requires_grad:
            x = cast(Callable[..., Tensor], _Counted.apply)(x, self.choice.passes)
        if places is None:
            return inner.call(x)
        map_ = inner.map()
        part = sliced(map_, places) if writes else sliced(map_, None, places)

        def multiply_part(x: Tensor) -> Tensor:
            if not writes:
                return part(x.index_select(-1, places))
            # not a Placement: copying along the last axis takes several times as long as adding
            y = part(x)
            return y.new_zeros(*y.shape[:-1], map_.shape[0]).index_add(-1, places, y)

        whole = self.choice.whole_of(x, inner.sequences)
        if whole is None:
            return multiply_part(x)
        rows, others = (tokens.flatten().nonzero().flatten() for tokens in (whole, ~whole))
        flat = x.flatten(0, -2)
        y = torch.cat([inner.call(flat.index_select(0, rows)), multiply_part(flat.index_select(0, others))])
        return y.index_select(0, torch.cat([rows, others]).argsort()).view(*x.shape[:-1], -1)


class _Counted(torch.autograd.Function):
    """The identity, whose backward counts a pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passes: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # asking for it makes checkpointing repeat the forward pass before the pass counts
        ctx.passes = passes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.saved_tensors:
            ctx.passes.add_(1)
        return gradients[0], None


def skeleton(module: nn.Module, predictors: Mapping[str, nn.Module], reader: str) -> nn.Module:
    """Return a copy of an MLP that returns its hidden units, predicted.

    Args:
        module: the MLP.
        predictors: what stands for the layers that write the units, by name in the module.
        reader: name of the layer that reads them.
    """
    instead = {id(module.get_submodule(name)): predictor for name, predictor in predictors.items()}
    instead[id(module.get_submodule(reader))] = nn.Identity()
    return copy.deepcopy(module, cast(dict[int, Any], instead))
