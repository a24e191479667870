"""ACIP: singular values switched off one by one by a growing penalty; the order in which they go ranks them all.

    W = U diag(s * m) V^T + (alpha / r) B A,    m_i = [p_i > 0], straight through to ReLU(p_i)
    min over p, A, B of  cross-entropy + lambda sum |ReLU(p)|_1,    lambda = lambda_0 growth^step
    score_i = p_i of the survivors, minus the number of steps since it was switched off otherwise

One search serves every budget: the highest scores are kept until the budget is spent, layers whose factors would be
larger than dense stay dense. In the tuning the masks are fixed and A, B trained on. They are then folded in,

    W' = [U_k  (alpha / r) B] [s_k V_k^T; A]    of rank k + r, which is what the budget counts

the paper keeps them beside the factors, uncounted. With trained=factors the sum of the first k + r singular values and
B A is truncated to rank k + r on the layer's inputs instead, and its factors are trained.

Structure: low rank. Metric: none for the choice, input second moment for a truncation. Budget: learned. Solver: AdamW.
Trained: masks and A, B in the search; A, B in the tuning. lambda_0, alpha, dropout and the stop at 0.4 of the numbers
are the paper's. Scaled to minutes: a step stands for 20 of the paper's (rate 1e-3 for 5e-5, growth 1.05
for 1.01 every 4 steps), 100 tuning steps for 1,000; r is 32 or an eighth of the layer's rank: in a small layer 32 would
hide what the masks remove.

Source: Genzel et al. 2025, "Choose your model size: any compression of LLMs without re-computation", sections 3.2-3.4;
initial masks of norm 1, scores and settings as in merantix-momentum/acip.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.fit import Metric, regress
from eckart.linalg import svd_of_product, truncated_svd
from eckart.maps import LowRank
from eckart.methods.compress.learner import Layers, LearnedLayer, Learner, course, frozen
from eckart.methods.compress.recipe import Recipe, check_least, check_share, input_moment
from eckart.methods.training import Step

Trained = Literal["lora", "factors"]
Basis = Literal["plain", "inputs"]
ALPHA, SMALLEST_SHARE = 16.0, 8


class MaskedSVD(LearnedLayer):
    """U diag(s * m) V^T + (alpha / r) B A with learned m, A and B.

    Args:
        weight: W (m, n).
        bias: (m,), or None.
        metric: under which the singular values are those of W; None for the plain ones.
        lora_rank: r, at most an eighth of the layer's rank is used.
        dropout: of the input of A.
        generator: draws A.
        folds: whether A and B become r of the components of every rank, instead of being truncated away.
    """

    off: Tensor
    age: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        metric: Metric | None,
        lora_rank: int,
        dropout: float,
        generator: torch.Generator,
        *,
        folds: bool,
    ) -> None:
        m, n = weight.shape
        super().__init__((m, n), bias)
        full = min(m, n)
        self.left, self.right = map(frozen, _components(weight, metric))  # (m, K), (K, n)
        self.unit = 1 / math.sqrt(full)
        self.gate = nn.Parameter(weight.new_full((full,), self.unit))
        rank = max(1, min(lora_rank, full // SMALLEST_SHARE))
        bound = 1 / math.sqrt(n)
        drawn = torch.empty(rank, n).uniform_(-bound, bound, generator=generator)
        self.down, self.up = nn.Parameter(drawn.to(weight.device)), nn.Parameter(weight.new_zeros(m, rank))
        self.dropout, self._scale = dropout, ALPHA / lora_rank
        self.folded = rank if folds else 0
        self.register_buffer("off", torch.zeros_like(self.gate.data))  # steps since each was switched off
        self.register_buffer("age", weight.new_zeros(()))  # steps in all

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis; what the masks get from above is divided by their first value, as in the paper."""
        open_, soft = (self.gate > 0).to(x.dtype), F.relu(self.gate) / self.unit
        mask = open_ + soft - soft.detach()
        lora = F.linear(F.linear(F.dropout(x, self.dropout), self.down), self.up)
        return F.linear(F.linear(x, self.right) * mask, self.left, self.bias) + self._scale * lora

    @property
    def alive(self) -> int:
        """How many singular values are switched on."""
        return int((self.gate > 0).sum())

    def count(self) -> None:
        """Note that a step was done."""
        closed = self.gate <= 0
        self.off.add_(1).mul_(closed)
        self.age.add_(1)

    def matrix(self) -> Tensor:
        return self.target(self.left.shape[1])

    def target(self, rank: int) -> Tensor:
        kept = self._kept(rank)
        return (self.left[:, kept] @ self.right[kept] + self._scale * self.up @ self.down).detach()

    def factors(self, rank: int, seen: Metric) -> LowRank:
        if not 0 < self.folded <= rank < len(self.gate):
            return super().factors(rank, seen)
        kept = self._kept(rank)
        up = torch.cat((self.left[:, kept], self._scale * self.up), 1)
        return LowRank(up.detach(), torch.cat((self.right[kept], self.down)).detach())

    def scores(self) -> Tensor:
        values = self._values().sort(descending=True, stable=True).values
        return torch.cat((values[:1].expand(self.folded), values))[: len(values)]

    def hold(self, rank: int) -> None:
        kept = self._kept(rank)
        if rank < self.folded:  # what the tuning trains has to be what is kept
            best = svd_of_product([(self.up.detach(), self.down.detach())], rank)
            root = best.values.sqrt()
            self.up, self.down = nn.Parameter(best.left * root), nn.Parameter(root[:, None] * best.right)
            self.folded = rank
        with torch.no_grad():
            self.gate.fill_(-self.unit)[kept] = self.unit
        self.gate.requires_grad_(False)

    def _kept(self, rank: int) -> Tensor:
        """Return the singular values that a map of a rank has; all of them at full rank, where it is dense."""
        values = self._values()
        count = rank if rank == len(values) else max(rank - self.folded, 0)
        return values.argsort(descending=True, stable=True)[:count]

    def _values(self) -> Tensor:
        """Return every singular value's score, moved up to be positive: (K,)."""
        return torch.where(self.gate > 0, self.gate, -self.off).detach() + self.age + 1


def _components(weight: Tensor, metric: Metric | None) -> tuple[Tensor, Tensor]:
    """Return U (m, K) and diag(s) V^T (K, n) of W, or of its best maps of all ranks under a metric; K = min(m, n)."""
    if metric is None:
        svd = truncated_svd(weight)
        return svd.left, svd.values[:, None] * svd.right
    full = min(weight.shape)
    best = regress(weight, metric, rank=full).factors(full)
    missing = full - best.rank  # of a weight that is not of full rank
    return F.pad(best.up, (0, missing)).to(weight), F.pad(best.down, (0, 0, 0, missing)).to(weight)


@dataclass(frozen=True, slots=True)
class MaskLearner(Learner):
    """The search of ACIP.

    Attributes:
        penalty: lambda_0.
        growth: of lambda, per step.
        stop: share of the layers' numbers at which the search ends.
        lora_rank: r.
        dropout: of the input of A.
        folds: whether the tuning trains A and B, which are then part of the factors.
        basis: whose singular values are masked: "plain", or "inputs", of the layer's output on its inputs.
    """

    penalty: float = 1e-3
    growth: float = 1.05
    stop: float = 0.4
    lora_rank: int = 32
    dropout: float = 0.05
    folds: bool = True
    basis: Basis = "plain"

    @property
    def holds(self) -> bool:
        return self.folds

    def layer(
        self, weight: Tensor, bias: Tensor | None, share: float, generator: torch.Generator, seen: Metric
    ) -> LearnedLayer:
        return MaskedSVD(
            weight,
            bias,
            seen if self.basis == "inputs" else None,
            self.lora_rank,
            self.dropout,
            generator,
            folds=self.folds,
        )

    def apart(self, name: str) -> bool:
        return name.endswith(".gate")

    def objective(self, loss: Tensor, layers: Layers, step: Step) -> Tensor:
        gates = torch.cat([F.relu(layer.gate) for layer in layers.values()])
        return loss + self.penalty * self.growth**step.index * gates.sum()

    def after(self, layers: Layers, step: Step) -> bool:
        size = full = 0
        for each in layers.values():
            layer = cast(MaskedSVD, each)
            layer.count()
            m, n = layer.shape
            size, full = size + min(layer.alive * (m + n), m * n), full + m * n
        return size <= self.stop * full


def acip(
    *,
    steps: int = 400,
    tune: int = 100,
    rate: float = 1e-3,
    batch: int = 4,
    penalty: float = 1e-3,
    growth: float = 1.05,
    stop: float = 0.4,
    lora_rank: int = 32,
    dropout: float = 0.05,
    trained: Trained = "lora",
    basis: Basis = "plain",
) -> Recipe:
    """Singular values switched off by a growing penalty on learned masks, one search for all budgets.

    Args:
        steps: most steps of the search.
        tune: steps in which the corrections, or the factors kept, are trained.
        rate: learning rate of both.
        batch: windows per step.
        penalty: lambda_0, weight of the masks' sum at first.
        growth: factor of that weight per step.
        stop: share of the layers' numbers at which the search ends.
        lora_rank: rank of the correction trained beside every layer, at most an eighth of the layer's.
        dropout: share of its inputs dropped in a step.
        trained: what the tuning trains: "lora", the corrections, which count as part of the rank; or "factors", into
            which they were truncated.
        basis: which singular values are masked: the weight's own ("plain"), or those of its output on its inputs.
    """
    check_share("stop", stop)
    check_share("dropout", dropout)
    check_least("penalty", penalty, 0)
    check_least("growth", growth, 1)
    check_least("lora_rank", lora_rank, 1)
    check_least("steps", steps, 1)
    learner = MaskLearner(
        search=course(steps, rate, batch, final=1.0),
        tuning=course(tune, rate, batch),
        penalty=penalty,
        growth=growth,
        stop=stop,
        lora_rank=lora_rank,
        dropout=dropout,
        folds=trained == "lora",
        basis=basis,
    )
    return Recipe(metric=input_moment, allocation="threshold", learner=learner)
