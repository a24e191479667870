"""CorDA: LoRA that starts from the weight's directions on the data, or from those the data does not use.

    W C = U S V^T,   W = U S (V^T C^-1),   C = E x x^T + d I
    instruction mode: the r largest triplets train;  knowledge mode: the r smallest, C being of data to be remembered

    W' = W - s B0 A0 + s B A,    B0 = U_r (S_r / s)^(1/2),  A0 = (S_r / s)^(1/2) V_r^T C^-1

d is 0.01 of the mean diagonal of E x x^T. The paper divides every sample by its largest entry first; here all tokens
count alike.

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers. Data: moments of the inputs.

Source: Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", eq. 2-6.
"""

from typing import Literal

import torch

from eckart.hosts import Adapter
from eckart.linalg import truncated_svd
from eckart.methods.adapt.layer import ACCURACY, Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, moved_start, root_split

DAMPING = 0.01


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
        k, moment = layer.fitting(rank), layer.input_moments().second.double()
        moment = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype).to(moment)
        weighted = layer.weight().double() @ moment
        if mode == "instruction":
            found = truncated_svd(weighted, k, accuracy=ACCURACY)
            left, values, right = found.left, found.values, found.right
        else:
            found = truncated_svd(weighted)
            left, values, right = found.left[:, -k:], found.values[-k:], found.right[-k:]
        back = torch.linalg.solve(moment, right.mT).mT
        return moved_start(root_split(left, values, back, scale).to(torch.float32), scale)

    return Recipe(build, rate=3e-4, uses_inputs=True)
