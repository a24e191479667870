"""TLoRA: a trained transform of full rank before the layer and a residual beside it, both tensor trains.

    W' = W T + R,    T = I and R = 0 at the start

The first slot of every bond of T holds the identity of its index, the others start random up to the last core, which is
zero there. Both are applied core by core (maps/tensor_train.py).

Structure: tensor train before W, tensor train added. Start: W. Trained: cores; sum of r_(k-1) n_k n_k r_k for T and of
r_(k-1) m_k n_k r_k for R.

Source: Tao et al. 2025, "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image
Models". Its tensor networks (rings, by memory), sizes and start are not verified.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus, Times
from eckart.maps import factored, tensor_train
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def tlora(*, rank: int = 4, sites: int = 3) -> Recipe:
    """A trained transform of full rank before the layer and a residual beside it.

    Args:
        rank: r, bonds of both tensor trains.
        sites: indices by which inputs and outputs are numbered.
    """
    check_rank(rank)
    if sites < 1:
        raise EckartError(f"sites must be at least 1, got {sites}")

    def build(layer: Layer) -> Adapter:
        heights, widths = (factored(size, sites) for size in layer.shape)
        random = layer.generator()
        transform = _identity(_random(widths, widths, rank, random))
        residual = _random(heights, widths, rank, random)
        residual[0].zero_()
        right, plus = (tensor_train([core.to(layer.device) for core in cores]) for cores in (transform, residual))
        return Adapter([Times(right), Plus(plus)])

    return Recipe(build, rate=1e-3)


def _random(heights: Sequence[int], widths: Sequence[int], rank: int, random: Generator) -> list[Tensor]:
    """Return random cores that keep the size of what they are applied to."""
    bonds = [1, *[rank] * (len(widths) - 1), 1]
    sides = zip(pairwise(bonds), heights, widths, strict=True)
    return [torch.randn(r, m, n, s, generator=random) / (n * s) ** 0.5 for (r, s), m, n in sides]


def _identity(cores: list[Tensor]) -> list[Tensor]:
    """Return the cores of square matrices with the identity in the first slot of every bond and nothing beside it."""
    for core in cores[1:]:
        core[0] = 0
    for core in cores[:-1]:
        core[..., 0] = 0
    cores[-1].zero_()
    for core in cores:
        core[0, ..., 0] = torch.eye(core.shape[1])
    return cores
