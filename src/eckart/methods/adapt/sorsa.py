"""SORSA: singular vectors and values of the weight train apart, held near orthonormal by a penalty.

    W' = W - s U0 S0 V0^T + s U diag(S) V^T,    penalty  gamma (|V^T V - I|_F + |U^T U - I|_F) / 2

Structure: low rank added, in three factors. Start: W. Trained: U, S, V; r (m + n + 1) numbers.

Source: Cao and Song 2024, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large
Language Models", section 3. The authors divide gamma by the learning rate in a step of its own; here the penalty is
part of the loss.
"""

import torch
from torch import Tensor

from eckart.hosts import Adapter
from eckart.maps import Dense, Diagonal, Product
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, moved_start


def sorsa(*, rank: int = 16, alpha: float = 16.0, gamma: float = 4e-4) -> Recipe:
    """Singular vectors and values of the weight trained apart, near orthonormal.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
        gamma: weight of the orthonormality penalty.
    """
    check_rank(rank)
    scale = alpha / rank

    def build(layer: Layer) -> Adapter:
        found = layer.svd(layer.fitting(rank))
        return moved_start(Product((Dense(found.left), Diagonal(found.values / scale), Dense(found.right))), scale)

    def penalty(adapter: Adapter) -> Tensor:
        change = adapter.chain()[1]
        left, right = change.get_parameter("delta.0.weight"), change.get_parameter("delta.2.weight")
        off = [gram - torch.eye(len(gram), device=gram.device) for gram in (left.mT @ left, right @ right.mT)]
        return gamma * (off[0].square().sum().sqrt() + off[1].square().sum().sqrt()) / 2

    return Recipe(build, rate=3e-4, penalty=penalty)
