"""CorDA: LoRA that starts from the weight's directions on the data, or from those the data does not use.

    W C = U S V^T,   W = U S (V^T C^-1),   V^T C^-1 = S^-1 U^T W,   C = E x x^T + d I
    instruction mode: the r largest triplets train;  knowledge mode: the r smallest, C being of data to be remembered

    W' = W - s B0 A0 + s B A,    B0 = U_r (S_r / s)^(1/2),  A0 = (S_r / s)^(1/2) V_r^T C^-1

d is 0.01 of the mean diagonal of E x x^T. The paper divides every sample by its largest entry first; here all tokens
count alike.

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers. Data: moments of the inputs.

Source: Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", eq. 2-6.
"""

from typing import Literal

import torch
from torch import Tensor

from eckart.hosts import Adapter
from eckart.linalg import leading_svd, truncated_svd
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, moved_start, root_split

DAMPING = 0.01
# Singular values below this share of the largest are rounding.
RESOLVED = 1e-12


def corda(*, rank: int = 16, alpha: float = 16.0, mode: Literal["instruction", "knowledge"] = "instruction") -> Recipe:
    """LoRA started from the weight's decomposition under the inputs' moment.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
        mode: "instruction" trains the components that the data uses most, "knowledge" those it uses least.
    """
    check_rank(rank)
    scale = alpha / rank

    def build(layer: Layer) -> Adapter:
        k, weight, moment = layer.fitting(rank), layer.weight().double(), _damped(layer)
        if mode == "instruction":
            found = leading_svd([layer.weight(), moment], k, seed=layer.seed)
            left, values = found.left, found.values
            inverse = torch.where(values > RESOLVED * values.max(), 1 / values, 0.0)
            back = inverse[:, None] * (left.mT @ weight)
        else:  # of values that may be tiny
            found = truncated_svd(weight @ moment)
            left, values = found.left[:, -k:], found.values[-k:]
            back = torch.linalg.solve(moment, found.right[-k:].mT).mT
        return moved_start(root_split(left, values, back, scale).to(torch.float32), scale)

    return Recipe(build, rate=3e-4, uses_inputs=True)


def _damped(layer: Layer) -> Tensor:
    """Return C, (n, n) float64, found once for all layers that see the same inputs."""

    def find() -> tuple[Tensor]:
        moment = layer.input_moments().second.double().clone()
        moment.diagonal().add_(DAMPING * moment.diagonal().mean())
        return (moment,)

    return layer.of_inputs("damped", find)[0]
