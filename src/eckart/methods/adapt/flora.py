"""FLoRA: a small core between trained factors, one for each axis of the weight.

    linear:       W' = W + s G x_1 U x_2 V = W + s U G V^T
    convolution:  W' = W + s G x_1 U x_2 V x_3 K_1 x_4 K_2 ...    axes: outputs, channels, those of the kernel

    G = 0, a factor of d r numbers normal with variance 1 / (2 r) at the start

No axis has a rank above its size: a kernel of 3 x 3 keeps its two axes whole. On a convolution this runs as three: V at
every position, a kernel of r channels, U at every position (hosts/convolution.py).

Structure: product of three, or a Tucker decomposition. Start: W. Trained: all; prod r_i + sum r_i d_i numbers.

Source: Si et al. 2024, "FLoRA: Low-Rank Core Space for N-dimension", and its published code for the start.
"""

import torch
from torch import Tensor

from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Dense, LinearMap, Product, Tucker
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def flora(*, rank: int = 8, scale: float = 1.0) -> Recipe:
    """A small core between trained factors, one for each axis of the weight.

    Args:
        rank: r, of every axis that is as long.
        scale: s.
    """
    check_rank(rank)
    return Recipe(lambda layer: Adapter([Plus(_start(layer, rank), scale)]), rate=1e-3)


def _start(layer: Layer, rank: int) -> LinearMap:
    axes = layer.axes
    ranks = (layer.fitting(rank),) * 2 if len(axes) == 2 else tuple(min(rank, size) for size in axes)
    counts = [size * r for size, r in zip(axes, ranks, strict=True)]
    factors = [
        numbers.view(-1, r) / (2 * r) ** 0.5
        for numbers, r in zip(layer.normal(sum(counts)).split(counts), ranks, strict=True)
    ]
    core = torch.zeros(ranks, device=layer.device)
    if len(axes) == 2:
        return Product((Dense(factors[0]), Dense(core), Dense(factors[1].mT.contiguous())))
    entries: list[Tensor] = [part.flatten() for part in (core, *factors)]
    return Tucker(torch.cat(entries), axes[:1], axes[1:], ranks)
