"""Dobi-SVD: learned positions at which the singular values of the layers' outputs are cut off.

    Y = X W^T = U diag(s) V^T,   Y' = U diag(s_i (tanh(beta (gamma - i)) + 1) / 2) V^T,   beta = 10
    min over one gamma per layer of  perplexity + 200 | size(gamma) / full - keep | + range penalty
    then  W' = P_k P_k^T W,    P_k the top k eigenvectors of  sum_s V_s V_s^T,    k nearest to gamma,
    V_s the k leading right singular vectors of the outputs on sequence s

Positions shift together by what separates their size from the budget. The paper finds P_k by incremental PCA over the
V_s, here it is exact, and of the original model's outputs. With `components=tokens` it is the PCA of the outputs
themselves, which streamed second moments of the inputs give: SVD-LLM's optimum, by theory no worse on the calibration
texts; then ranks are all that is left of the method.

Its remapping stores as many numbers of both factors as the shorter side has in 8 bits and the rest in 16, k max(m, n)
words of 16 bits in all. With `bits=8` all are stored in 8 bits, k (m + n) / 2 such words, no more than that;
`storage=pivoted` has ranks up to the full one, as the remapping has.

Structure: low rank. Metric: leading outputs of sequences. Budget: learned. Solver: AdamW on the positions alone, closed
form for the maps. Trained: the positions. Scaled to minutes: 60 steps of 4 windows, all tokens of a step in one Y, and
a rate of 0.01 of full rank per step, falling to four fifths as in the paper (20 epochs of 256 windows of 2,048 tokens).

Source: Wang et al. 2025, "Dobi-SVD: differentiable SVD for LLM compression", sections 3.1-3.3; settings as in
wangqinsi1/Dobi-SVD.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.fit import Metric
from eckart.linalg import filtered_svd
from eckart.methods.compress.learner import Layers, LearnedLayer, Learner, course, frozen
from eckart.methods.compress.recipe import Recipe, check_least, input_moment
from eckart.methods.training import Step


class CutOutputs(LearnedLayer):
    """A frozen W whose outputs' singular values are cut off at a learned position.

    Args:
        weight: W (m, n).
        bias: (m,), or None.
        share: of the layers' numbers that may remain.
        beta: steepness of the cut.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, share: float, beta: float) -> None:
        m, n = weight.shape
        super().__init__((m, n), bias)
        self.weight, self.share, self.beta = frozen(weight), share, beta
        full = min(m, n)
        # gamma over full rank, at first where all layers together meet the budget
        self.position = nn.Parameter(weight.new_tensor(share * m * n / (m + n) / full))

    @property
    def gamma(self) -> Tensor:
        """The position, in ranks."""
        return self.position * min(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis; the tokens of all sequences are the rows of one matrix."""
        y = F.linear(x, self.weight)
        rows = y.reshape(-1, y.shape[-1])
        places = torch.arange(min(rows.shape), device=x.device) + 0.5  # gamma = k keeps k of them
        mask = (torch.tanh(self.beta * (self.gamma - places)) + 1) / 2
        cut = filtered_svd(rows, mask).reshape(y.shape)
        return cut if self.bias is None else cut + self.bias

    def size(self) -> Tensor:
        """Return the numbers stored at the position, differentiable: two factors, or the dense matrix if smaller."""
        m, n = self.shape
        return (self.gamma * (m + n)).clamp(max=m * n)

    def outside(self) -> Tensor:
        """Return how far the position lies outside [0, full rank], squared, in shares of full rank."""
        return F.relu(-self.position).square() + F.relu(self.position - 1).square()

    def matrix(self) -> Tensor:
        return self.weight.detach()

    def scores(self) -> Tensor:
        """Return how far before the position each rank lies, in shares of full rank and moved up to be positive."""
        full = min(self.shape)
        return (self.position.detach() + 2 - torch.arange(full, device=self.weight.device) / full).clamp_min(1e-6)


@dataclass(frozen=True, slots=True)
class PositionLearner(Learner):
    """The search of Dobi-SVD.

    Attributes:
        beta: steepness of the cut.
        penalty: weight of the size's distance from the budget.
    """

    beta: float = 10.0
    penalty: float = 200.0

    def layer(
        self, weight: Tensor, bias: Tensor | None, share: float, generator: torch.Generator, seen: Metric
    ) -> LearnedLayer:
        return CutOutputs(weight, bias, share, self.beta)

    def objective(self, loss: Tensor, layers: Layers, step: Step) -> Tensor:
        cuts = [cast(CutOutputs, layer) for layer in layers.values()]
        size = torch.stack([cut.size() for cut in cuts]).sum()
        full = sum(cut.shape[0] * cut.shape[1] for cut in cuts)
        outside = torch.stack([cut.outside() for cut in cuts]).sum()
        return loss.exp() + self.penalty * (size / full - cuts[0].share).abs() + outside


def dobi_svd(
    *,
    steps: int = 60,
    tune: int = 0,
    rate: float = 0.01,
    batch: int = 4,
    beta: float = 10.0,
    penalty: float = 200.0,
    components: Literal["sequences", "tokens"] = "sequences",
) -> Recipe:
    """Output PCA with ranks learned by gradient descent through the singular values of the outputs.

    Args:
        steps: steps of the search.
        tune: steps in which the factors are trained, none in the paper.
        rate: learning rate of the positions, in shares of full rank; a tenth of it is the rate of the tuning.
        batch: windows per step.
        beta: steepness of the cut.
        penalty: weight of the size's distance from the budget.
        components: whether the leading outputs of every sequence weigh alike, or those of every token.
    """
    check_least("penalty", penalty, 0)
    check_least("beta", beta, 0)
    check_least("steps", steps, 1)
    learner = PositionLearner(
        search=course(steps, rate, batch, final=0.8),
        tuning=course(tune, rate / 10, batch),
        any_size=False,
        by_sequence=components == "sequences",
        beta=beta,
        penalty=penalty,
    )
    return Recipe(metric=input_moment, allocation="threshold", learner=learner)
