"""Maestro: factors trained with ordered dropout, so that every prefix of them is a model of its own.

    W = U V,    each step one layer and one rank b at random:  W_b = U[:, :b] V[:b]
    min of  cross-entropy + lambda sum over layers and b of ( |U[:, b:]|_F + |V[b:]|_F )
    a component with |u_i| |v_i| < 1e-5, and all behind it, is dropped for good

For a linear map on isotropic inputs the prefixes converge to its truncated SVDs, for a linear autoencoder to the
principal components. Ranks follow from one threshold on |u_i| |v_i|; a layer's map is a prefix, no further fit.

Structure: low rank. Metric: none. Budget: learned. Solver: AdamW. Trained: everything inside the blocks, in the search
from the weights' own SVD, in the tuning from the prefixes kept. The threshold is the paper's, lambda = 1e-6 that of its
ImageNet runs. Scaled to minutes and to a model that is trained already: 200 and 100 steps instead of many epochs.

Source: Horvath et al. 2024, "Maestro: uncovering low-rank structures via trainable decomposition", section 3 and
theorems 4.1-4.3; settings as in SamuelHorvath/Maestro-LoD.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.fit import Metric
from eckart.linalg import truncated_svd
from eckart.maps import LowRank
from eckart.methods.compress.learner import Layers, LearnedLayer, Learner, course
from eckart.methods.compress.recipe import Recipe, check_least, input_moment
from eckart.methods.training import Step

# Keeps the slope of a norm finite where the norm is zero.
TINY = 1e-24


class OrderedFactors(LearnedLayer):
    """U V with ordered components; a forward uses the first `sampled` of those not dropped.

    Args:
        up: U (m, K).
        down: V (K, n).
        bias: (m,), or None.
    """

    rank: Tensor

    def __init__(self, up: Tensor, down: Tensor, bias: Tensor | None = None) -> None:
        super().__init__((up.shape[0], down.shape[1]), bias)
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())
        self.register_buffer("rank", torch.tensor(down.shape[0]))
        self.sampled: int | None = None

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None) -> "OrderedFactors":
        """Return the layer that starts as the SVD of W (m, n), balanced between its factors."""
        svd = truncated_svd(weight)
        root = svd.values.sqrt()
        return OrderedFactors(svd.left * root, root[:, None] * svd.right, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        b = int(self.rank) if self.sampled is None else self.sampled
        return F.linear(F.linear(x, self.down[:b]), self.up[:, :b], self.bias)

    def sample(self, generator: torch.Generator) -> None:
        """Use a random prefix of the factors in the next forward."""
        self.sampled = 1 + int(torch.randint(max(1, int(self.rank)), (1,), generator=generator))

    def penalty(self) -> Tensor:
        """Return the hierarchical group lasso: the norms of all trailing parts, summed."""
        b = int(self.rank)
        tails = [
            squares.flip(0).cumsum(0).clamp_min(TINY).sqrt().sum()
            for squares in (self.up[:, :b].square().sum(0), self.down[:b].square().sum(1))
        ]
        return tails[0] + tails[1]

    @torch.no_grad()
    def drop(self, threshold: float) -> None:
        """Drop the trailing components whose size is below a threshold; one always stays."""
        large = (self._sizes() >= threshold).nonzero()
        self.rank.fill_(min(int(self.rank), 1 + int(large.max()) if large.numel() else 1))

    def _sizes(self) -> Tensor:
        return cast(Tensor, self.up.norm(dim=0) * self.down.norm(dim=1)).detach()

    def matrix(self) -> Tensor:
        b = int(self.rank)
        return (self.up[:, :b] @ self.down[:b]).detach()

    def scores(self) -> Tensor:
        """Return |u_i| |v_i|, the largest of it and all behind it, since components go from the end; (K,)."""
        sizes = self._sizes()
        sizes[int(self.rank) :] = 0
        return sizes.flip(0).cummax(0).values.flip(0)

    def factors(self, rank: int, seen: Metric) -> LowRank:
        return LowRank(self.up[:, :rank].detach().clone(), self.down[:rank].detach().clone())


@dataclass(frozen=True, slots=True)
class OrderedLearner(Learner):
    """The search of Maestro.

    Attributes:
        penalty: lambda.
        threshold: size below which a component is dropped.
    """

    penalty: float = 1e-6
    threshold: float = 1e-5

    def layer(
        self, weight: Tensor, bias: Tensor | None, share: float, generator: torch.Generator, seen: Metric
    ) -> LearnedLayer:
        return OrderedFactors.of(weight, bias)

    def prepare(self, layers: Layers, step: Step) -> None:
        names = list(layers)
        picked = names[int(torch.randint(len(names), (1,), generator=step.generator))]
        for name, layer in layers.items():
            layer.sampled = None
            if name == picked:
                layer.sample(step.generator)

    def objective(self, loss: Tensor, layers: Layers, step: Step) -> Tensor:
        if not self.penalty:
            return loss
        return loss + self.penalty * torch.stack([layer.penalty() for layer in layers.values()]).sum()

    def after(self, layers: Layers, step: Step) -> bool:
        for layer in layers.values():
            layer.drop(self.threshold)
        return False


def maestro(
    *,
    steps: int = 200,
    tune: int = 100,
    rate: float = 1e-3,
    batch: int = 4,
    penalty: float = 1e-6,
    threshold: float = 1e-5,
) -> Recipe:
    """Factors trained with ordered dropout and a hierarchical group lasso, one search for all budgets.

    Args:
        steps: steps of the search.
        tune: steps in which the prefixes kept are trained.
        rate: learning rate of both.
        batch: windows per step.
        penalty: lambda, weight of the trailing parts' norms.
        threshold: size below which a component is dropped.
    """
    check_least("penalty", penalty, 0)
    check_least("threshold", threshold, 0)
    check_least("steps", steps, 1)
    learner = OrderedLearner(
        search=course(steps, rate, batch),
        tuning=course(tune, rate, batch),
        everything=True,
        penalty=penalty,
        threshold=threshold,
    )
    return Recipe(metric=input_moment, allocation="threshold", learner=learner)
