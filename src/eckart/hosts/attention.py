"""Attention scores at a rank chosen for every call: what sits in an attention layer, and how it chooses.

    softmax(c Q K^T) V  ~  softmax(c (Q U_:r) (V_:r K^T)) V,    U V = I at full rank

A policy sees, for every rank, the bound on how far the softmax moves and the exact error of the scores
(`eckart.linalg.score_errors`), which cost as much as projecting queries and keys once.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from eckart.linalg import score_errors
from eckart.maps import Gated

# Added before logarithms: errors below this are rounding in float32.
TINY = 1e-6


@dataclass(frozen=True, slots=True)
class Errors:
    """What every rank would lose in one call.

    Attributes:
        bound: (b, R), on the total variation of the softmax, mean over heads and queries.
        scores: (b, R), root mean square error of the scores over all pairs.
    """

    bound: Tensor
    scores: Tensor

    def features(self) -> Tensor:
        """Return what a learned policy sees, (b, 2 (R - 1)): logarithms, without those of the full rank."""
        return (torch.cat([self.bound[:, :-1], self.scores[:, :-1]], 1) + TINY).log()


class Policy(Protocol):
    """Chooses among the ranks of a gate."""

    def __call__(self, errors: Errors) -> Tensor:
        """Return the index of the rank chosen for each sample, (b,) int64."""


@dataclass(frozen=True, slots=True)
class FixedRank:
    """Always the same rank.

    Attributes:
        index: of the rank.
    """

    index: int

    def __call__(self, errors: Errors) -> Tensor:
        return torch.full((len(errors.bound),), self.index, device=errors.bound.device)


@dataclass(frozen=True, slots=True)
class BoundedRank:
    """The least rank that is certain to move the softmax, on average over heads and queries, by no more than this.

    Attributes:
        tolerance: total variation, in [0, 1].
    """

    tolerance: float

    def __call__(self, errors: Errors) -> Tensor:
        return (errors.bound > self.tolerance).sum(1)  # the bound falls with the rank, to 0


@dataclass(frozen=True, slots=True, eq=False)
class LearnedRank:
    """The rank of largest logit.

    Attributes:
        weight: (2 (R - 1), R).
        bias: (R,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, errors: Errors) -> Tensor:
        features = errors.features()
        return (features @ self.weight.to(features) + self.bias.to(features)).argmax(1)


class RankGate(nn.Module):
    """Chooses the rank at which one attention layer computes its scores.

    Its tensors move with the model, but are not part of its state dict.

    Args:
        map: the ordered factorizations of the identity, one per key head.
        policy: what chooses.

    Attributes:
        calls: calls in which a rank was chosen.
        total: sum of the ranks chosen.
        seen: errors of every call, if a list is put here.
    """

    def __init__(self, map: Gated, policy: Policy) -> None:
        super().__init__()
        self.register_buffer("up", map.up, persistent=False)
        self.register_buffer("down", map.down, persistent=False)
        self.ranks, self.policy = map.ranks, policy
        self.calls, self.total = 0, 0
        self.seen: list[Errors] | None = None

    @property
    def map(self) -> Gated:
        """The factorizations, where the model is."""
        return Gated(self.get_buffer("up"), self.get_buffer("down"), self.ranks)

    def forward(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return queries and keys in as many dimensions as the policy chooses; unchanged at full rank.

        They are unchanged, too, where projecting them would cost more than all scores, as for a single new token.

        Args:
            query: (b, h g, q, d).
            key: (b, h, t, d).
            scale: what scores are multiplied with.
        """
        map_ = self.map
        (b, heads, q, d), t, h = query.shape, key.shape[2], len(map_.up)
        if heads * q * t <= d * (heads * q + h * t):
            return query, key
        grouped = query.view(b, h, heads // h, q, d)
        left = grouped.float() @ map_.up.float()[:, None]
        right = map_.right(key.float(), d)
        errors = Errors(*score_errors(left, right, self.ranks, scale))
        if self.seen is not None:
            self.seen.append(errors)
        rank = self.ranks[int(self.policy(errors).max())]  # one rank for the batch: that of its hardest sample
        self.calls, self.total = self.calls + 1, self.total + rank
        if rank == d:
            return query, key
        return left[..., :rank].reshape(b, heads, q, rank).to(query.dtype), right[..., :rank].to(key.dtype)


class MomentWatch(nn.Module):
    """Sums the second moments of queries and keys that pass through one attention layer, changing nothing.

    Attributes:
        queries: (h, d, d) float64, summed over the heads that share a key head; None before the first call.
        keys: (h, d, d) float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return queries (b, h g, q, d) and keys (b, h, t, d) as they are."""
        (b, _, q, d), h = query.shape, key.shape[1]
        grouped = query.double().view(b, h, -1, q, d).transpose(0, 1).reshape(h, -1, d)
        flat = key.double().transpose(0, 1).reshape(h, -1, d)
        sums = [x.mT @ x for x in (grouped, flat)]
        self.queries = sums[0] if self.queries is None else self.queries + sums[0]
        self.keys = sums[1] if self.keys is None else self.keys + sums[1]
        return query, key
