"""MPS adaptation: a matrix product state added, of which LoRA is the case of two sites.

    W' = W + (alpha / D) G_1[i_1] ... G_a[i_a] H_1[j_1] ... H_b[j_b],    i = (i_1, ..., i_a),  j = (j_1, ..., j_b)

Outputs and inputs are numbered by several indices each, and neighbours share a bond of D. In every step the cores G
become one thin matrix and the cores H another (maps/tensor_train.py).

Structure: tensor train added. Start: W. Trained: cores; sum of D_(k-1) d_k D_k numbers, d_k the sizes of the indices.

Source: "Artificial Entanglement in the Fine-Tuning of Large Language Models" 2025. Its cores, start and bonds are not
verified: here indices are as equal as divisors allow, G_1 is zero at the start and the others are normal.
"""

import math
from itertools import pairwise

import torch

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import factored, tensor_train
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def mps(*, rank: int = 16, sites: int = 2, alpha: float = 16.0) -> Recipe:
    """A matrix product state added.

    Args:
        rank: D, the bond; fewer where the indices on one side of it have no more values.
        sites: indices of the outputs, and of the inputs; 1 is LoRA.
        alpha: the change is scaled by alpha / D.
    """
    check_rank(rank)
    if sites < 1:
        raise EckartError(f"sites must be at least 1, got {sites}")

    def build(layer: Layer) -> Adapter:
        heights, widths = (factored(size, sites) for size in layer.shape)
        sizes, random = (*heights, *widths), layer.generator()
        bonds = [min(rank, math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1)]
        cores = []
        for k, (before, after) in enumerate(pairwise(bonds)):
            m, n = (sizes[k], 1) if k < sites else (1, sizes[k])
            drawn = torch.randn(before, m, n, after, generator=random) / (n * after) ** 0.5
            cores.append((drawn if k else torch.zeros_like(drawn)).to(layer.device))
        return Adapter([Plus(tensor_train(cores), alpha / rank)])

    return Recipe(build, rate=1e-3)
