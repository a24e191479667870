"""FLoRA: a small core between two trained factors.

    W' = W + s U G V^T,    G (r, r) = 0 and U (m, r), V (n, r) normal with variance 1 / (2 r) at the start

This is the Tucker form for the two axes of a linear layer; the paper's forms for the four and five axes of convolutions
are left out, as are convolutions.

Structure: product of three. Start: W. Trained: G, U, V; r^2 + r (m + n) numbers.

Source: Si et al. 2024, "FLoRA: Low-Rank Core Space for N-dimension", and its published code for the start.
"""

import torch

from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Dense, Product
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def flora(*, rank: int = 8, scale: float = 1.0) -> Recipe:
    """A small core between two trained factors.

    Args:
        rank: r.
        scale: s.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        r, m = layer.fitting(rank), layer.shape[0]
        drawn = layer.normal(sum(layer.shape), r) / (2 * r) ** 0.5
        core = torch.zeros(r, r, device=layer.device)
        return Adapter([Plus(Product((Dense(drawn[:m]), Dense(core), Dense(drawn[m:].mT.contiguous()))), scale)])

    return Recipe(build, rate=1e-3)
