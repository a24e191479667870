"""MiSS (formerly Bone): one narrow matrix repeated along the inputs.

    W' = W + [D D ... D],    D (m, r) = 0 at the start:  inputs r apart share their columns

Inputs are added up over the tiles first, so that one thin product without a second trained factor is all there is.

Structure: tiles added. Start: W. Trained: D; r m numbers.

Source: Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure" (earlier:
"Bone: Block-Affine Adaptation of Large Language Models").
"""

import torch

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Tiled
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def miss(*, rank: int = 64, dropout: float = 0.0) -> Recipe:
    """One trained narrow matrix repeated along the inputs.

    Args:
        rank: r, the width of the matrix.
        dropout: share of its inputs that is dropped in training.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        if rank > n:
            raise EckartError(f"rank {rank} is more than the {n} inputs of {layer.name}; use at most {n}")
        return Adapter([Plus(Tiled(torch.zeros(m, rank, device=layer.device), n), dropout=dropout)])

    return Recipe(build, rate=1e-3)
