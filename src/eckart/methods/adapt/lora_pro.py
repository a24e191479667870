"""LoRA-Pro: the gradients of the factors are replaced by those whose product moves W most like full fine-tuning.

    minimise over g_A, g_B   |s B g_A + s g_B A - G|_F:
    g_A = (B^T B)^-1 a / s^2 + X A,     g_B = (I - B (B^T B)^-1 B^T) b (A A^T)^-1 / s^2 - B X
    (B^T B) X + X (A A^T) = -(B^T B)^-1 a A^T / s^2

with a, b LoRA's own gradients of A and B; X, free for the product, keeps the factors' gradients closest to those. Both
Gram matrices are symmetric, so the Sylvester equation is two eigendecompositions of size r and a division.

The rule stands in autograd between factors and their use, hence works with any optimizer. (The authors feed Adam the
full gradient, whose moments are as large as W; here Adam sees g_A and g_B.)

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Wang et al. 2024, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", theorems 2.1 and 2.3.
"""

import torch
from torch import Tensor

from eckart.hosts import Adapter
from eckart.methods.adapt.recipe import Recipe, added, check_rank
from eckart.optim.gradients import factor_rule

DAMPING = 1e-8


def lora_pro(*, rank: int = 16, alpha: float = 16.0) -> Recipe:
    """LoRA whose steps come as near to those of full fine-tuning as its rank allows.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
    """
    check_rank(rank)
    scale = alpha / rank

    def closest(up: Tensor, down: Tensor, of_up: Tensor, of_down: Tensor) -> tuple[Tensor, Tensor]:
        return closest_to_full(up, down, of_up, of_down, scale)

    return Recipe(lambda layer: Adapter([added(layer, rank, scale)]), rate=1e-3, rule=factor_rule(closest))


def closest_to_full(up: Tensor, down: Tensor, of_up: Tensor, of_down: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return g_B and g_A of the formula above, from B (m, r), A (r, n) and their own gradients."""
    b, a, gb, ga = (t.double() for t in (up, down, of_up, of_down))
    (values_b, basis_b), (values_a, basis_a) = torch.linalg.eigh(b.mT @ b), torch.linalg.eigh(a @ a.mT)
    values_b, values_a = values_b.clamp_min(0), values_a.clamp_min(0)
    inverse_b = basis_b @ ((1 / (values_b + DAMPING))[:, None] * basis_b.mT)
    inverse_a = basis_a @ ((1 / (values_a + DAMPING))[:, None] * basis_a.mT)
    own_a = inverse_b @ ga / scale**2
    own_b = (gb - b @ (inverse_b @ (b.mT @ gb))) @ inverse_a / scale**2
    right = basis_b.mT @ (-own_a @ a.mT) @ basis_a
    free = basis_b @ (right / (values_b[:, None] + values_a[None] + DAMPING)) @ basis_a.mT
    return (own_b - b @ free).to(of_up.dtype), (own_a + free @ a).to(of_down.dtype)
