"""The scalar whose gradient says how much a layer's outputs matter, for decoders and encoders, with and without labels.

With labels drawn from the model itself the second moment of the gradient is the true Fisher matrix: half of the
quadratic form it defines is the second-order increase of the loss in nats. The texts' own labels give the empirical
Fisher that the gradient-based papers use. An encoder without a head is scored by random projections of its sentence
embedding: their gradients have J^T J as second moment, so the quadratic form is the squared distance it moves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.errors import EckartError


@dataclass(frozen=True, slots=True)
class Objective:
    """A differentiable scalar of a model's output.

    Attributes:
        name: short and unique, part of cache names.
        unit: what predicted increases are measured in.
        scalar: (output, ids (b, t), generator) -> the value summed over the batch.
        scale: (vectors, sequences) -> factor from E tr(B dW G dW^T) to the predicted increase in that unit.
    """

    name: str
    unit: str
    scalar: Callable[[Any, Tensor, torch.Generator], Tensor]
    scale: Callable[[int, int], float]


def _sampled(output: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    logits = output.logits.float().flatten(0, 1)  # (b t, V)
    uniform = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device)
    cumulative = logits.detach().softmax(-1).cumsum(-1)
    labels = (cumulative < uniform * cumulative[:, -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)
    return F.cross_entropy(logits, labels, reduction="sum")


def _observed(output: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    logits = output.logits.float()[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten().to(logits.device), reduction="sum")


def _embedding(output: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    embedding = sentence_embedding(output)
    direction = torch.randn(embedding.shape, generator=generator).to(embedding)
    return (embedding * direction).sum()


def sentence_embedding(output: Any) -> Tensor:
    """Return unit-length mean-pooled embeddings (b, d) from an encoder's output without padding."""
    return F.normalize(output.last_hidden_state.float().mean(1), dim=-1)


OBJECTIVES = {
    o.name: o
    for o in (
        Objective("sampled-labels", "nats per token", _sampled, lambda vectors, sequences: 0.5),
        Objective("observed-labels", "nats per token", _observed, lambda vectors, sequences: 0.5),
        Objective("sentence-embedding", "squared distance", _embedding, lambda vectors, sequences: vectors / sequences),
    )
}


def objective(labels: str, has_logits: bool, causal: bool) -> Objective:
    """Choose the objective of a model.

    Args:
        labels: "sampled" (from the model) or "observed" (the next tokens of the texts).
        has_logits: whether the model predicts tokens; if not, its sentence embedding is used.
        causal: whether those tokens are the next ones.

    Raises:
        EckartError: for observed labels on a model that does not predict next tokens.
    """
    if labels not in ("sampled", "observed"):
        raise EckartError(f"labels must be 'sampled' or 'observed', got {labels!r}")
    if not has_logits:
        return OBJECTIVES["sentence-embedding"]
    if labels == "observed" and not causal:
        raise EckartError("observed labels need a model that predicts the next token; use labels=sampled")
    return OBJECTIVES[f"{labels}-labels"]
