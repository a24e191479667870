"""How much a model changed: its loss, or the divergence of its outputs from the original's, from last hidden states."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.hosts import Blockwise
from eckart.stats import sentence_embedding

# Numbers of logits held at once.
LOGITS = 1 << 24


@torch.no_grad()
def outputs(
    runner: Blockwise, samples: Sequence[Tensor], hidden: Sequence[Tensor], head: Mapping[str, nn.Module] | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """Yield (ids, model output) in pieces, given the last block's outputs.

    Args:
        runner: the model.
        samples: batches of ids (b, t).
        hidden: the last block's outputs, (b, t, d) per batch.
        head: modules to put in place of the model's by name, such as a compressed head.
    """
    swaps = dict(head or {})
    vocabulary = int(getattr(runner.model.config, "vocab_size", 1))
    with contextlib.ExitStack() as stack:
        stack.enter_context(runner.resident_ends(head=runner.parts.head not in swaps, embedding=False))
        stack.enter_context(runner.swapped(swaps))
        for ids, states in zip(samples, hidden, strict=True):
            step = max(1, LOGITS // (ids.shape[1] * vocabulary))
            for a, b in zip(ids.split(step), states.split(step), strict=True):
                yield a.to(runner.device), runner.leave(b)


def next_token_loss(
    runner: Blockwise, samples: Sequence[Tensor], hidden: Sequence[Tensor], head: Mapping[str, nn.Module] | None = None
) -> float:
    """Return the mean loss of predicting each next token, in nats."""
    total, count = 0.0, 0
    for ids, output in outputs(runner, samples, hidden, head):
        logits = output.logits.float()[:, :-1].flatten(0, 1)
        total += float(F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").sum(dtype=torch.float64))
        count += ids.shape[0] * (ids.shape[1] - 1)
    return total / max(count, 1)


def divergence(
    runner: Blockwise,
    samples: Sequence[Tensor],
    original: Sequence[Tensor],
    hidden: Sequence[Tensor],
    head: Mapping[str, nn.Module] | None = None,
) -> float:
    """Return how far the outputs moved: the mean divergence of predicted tokens from the original's, in nats per token,
    or, for an encoder without a head, the mean squared distance between sentence embeddings.
    """
    total, count = 0.0, 0
    pairs = zip(outputs(runner, samples, original), outputs(runner, samples, hidden, head), strict=True)
    for (_, before), (_, after) in pairs:
        far = moved(before, after)
        total, count = total + float(far.sum(dtype=torch.float64)), count + far.numel()
    return total / max(count, 1)


def moved(before: Any, after: Any) -> Tensor:
    """Return how far a model's output moved: the divergence of every predicted token, (b, t), or the squared distance
    between sentence embeddings of an encoder without a head, (b,).
    """
    if "logits" not in before:
        far: Tensor = sentence_embedding(before) - sentence_embedding(after)
        return far.square().sum(-1)
    p, q = (o.logits.float().log_softmax(-1) for o in (before, after))
    divergences: Tensor = (p.exp() * (p - q)).sum(-1)
    return divergences
