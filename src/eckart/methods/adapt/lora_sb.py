"""LoRA-SB: LoRA-XS whose frozen factors and start come from the first step of full fine-tuning.

    W' = W + U_r R V_r^T,    U S V^T = -step sign(G),   R = S_r at the start,   G the mean gradient of the loss by W

With orthonormal U and V the gradient of R is the best rank-r picture of the full gradient throughout, so no scale is
needed. The model starts one (small) step of full fine-tuning away from W.

Structure: product of three, the outer two frozen. Trained: R; r^2 numbers. Data: gradients.

Source: Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient
Low-Rank Fine-Tuning", section 3.
"""

import torch

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.linalg import leading_svd
from eckart.maps import Dense, Product
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, train_only


def lora_sb(*, rank: int = 16, step: float = 1e-4) -> Recipe:
    """LoRA-XS started from the first step of full fine-tuning.

    Args:
        rank: r.
        step: length of that step for every weight.
    """
    check_rank(rank)
    if step <= 0:
        raise EckartError(f"step must be positive, got {step}")

    def build(layer: Layer) -> Adapter:
        update = -step * layer.weight_gradient().sign()
        found = leading_svd([update], layer.fitting(rank), seed=layer.seed)
        core = Dense(torch.diag(found.values))
        return Adapter([train_only(Plus(Product((Dense(found.left), core, Dense(found.right)))), "delta.1.")])

    return Recipe(build, rate=1e-3, uses_gradients=True)
