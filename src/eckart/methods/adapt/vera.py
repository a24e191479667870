"""VeRA: frozen random factors, of which two vectors train.

    W' = W + diag(b) B diag(d) A        A (r, n), B (m, r) frozen, uniform in +-sqrt(3 / n) and +-sqrt(3 / r)

The paper shares A and B between all layers of one shape; here each layer has its own, drawn from the seed and its name.

Structure: low rank added. Start: W, with b = 0 and d = 0.1. Trained: b, d; m + r numbers.

Source: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", section 3; r = 256, and d = 0.1 of its
appendix.
"""

import torch

from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Dense, Diagonal, Product
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def vera(*, rank: int = 256, dropout: float = 0.0) -> Recipe:
    """Frozen random factors, of which two vectors train.

    Args:
        rank: r, which may exceed the sides of a layer.
        dropout: share of the inputs of the random factors that is dropped in training.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        drawn = layer.uniform(rank, m + n)
        up, down = drawn[:, n:].mT * (3 / rank) ** 0.5, drawn[:, :n] * (3 / n) ** 0.5
        return Adapter([random_factors(torch.zeros(m), up, torch.full((rank,), 0.1), down, dropout).to(layer.device)])

    return Recipe(build, rate=4e-3)


def random_factors(rows: torch.Tensor, up: torch.Tensor, middle: torch.Tensor, down: torch.Tensor, drop: float) -> Plus:
    """Return the change W + diag(b) B diag(d) A with B and A frozen."""
    change = Plus(Product((Diagonal(rows), Dense(up), Diagonal(middle), Dense(down))), dropout=drop)
    for i in (1, 3):
        change.get_parameter(f"delta.{i}.weight").requires_grad_(False)
    return change
