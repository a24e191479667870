"""LoKr: one Kronecker product added, its larger factor of low rank where that is smaller.

    W' = W + (alpha / r) C (x) (B A),    C (m1, n1), B (m2, r), A (r, n2),    m1 m2 = m, n1 n2 = n

m1 and n1 are the largest divisors of m and n up to their roots. Where r is at least half of m2 and of n2, one matrix
(m2, n2) stands for B A. The product is applied as (C (x) B) (I (x) A), and W' - W is never written out.

Structure: Kronecker product added. Start: W, with C = 0, A and B uniform in +-1 over the root of their inputs. Trained:
C, B, A; m1 n1 + r (m2 + n2) numbers.

Source: Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", section
3.3, as PEFT has it: the divisors, the threshold and which factor starts at 0.
"""

import torch
from torch import Tensor

from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Kronecker, LinearMap, Product
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def lokr(*, rank: int = 8, alpha: float = 8.0) -> Recipe:
    """One Kronecker product added.

    Args:
        rank: r, of the larger factor.
        alpha: the product is scaled by alpha / r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        (m, n), (a, b) = layer.shape, (divisor(layer.shape[0]), divisor(layer.shape[1]))
        c, height, width = torch.zeros(a, b, device=layer.device), m // a, n // b
        if 2 * rank >= max(height, width):
            return Adapter([Plus(Kronecker(c[None], layer.uniform(1, height, width) / width**0.5), alpha / rank)])
        drawn = layer.uniform(rank * (height + width))
        up, down = drawn[: rank * height].view(height, rank), drawn[rank * height :].view(rank, width)
        return Adapter([factored_kronecker(c, up / rank**0.5, down / width**0.5, alpha / rank)])

    return Recipe(build, rate=1e-3)


def divisor(size: int) -> int:
    """Return the largest divisor of a size up to its root."""
    return next(d for d in range(int(size**0.5), 0, -1) if size % d == 0)


def factored_kronecker(left: Tensor, up: Tensor, down: Tensor, scale: float) -> Plus:
    """Return the change W + s C (x) (B A), which is s (C (x) B) (I (x) A), the identity frozen."""
    eye = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    factors: tuple[LinearMap, ...] = Kronecker(left[None], up[None]), Kronecker(eye[None], down[None])
    change = Plus(Product(factors), scale)
    change.get_parameter("delta.1.left").requires_grad_(False)
    return change
