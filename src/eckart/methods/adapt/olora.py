"""OLoRA: LoRA that starts from the first columns of a QR decomposition of the weight.

    W' = W - s B0 A0 + s B A,    B0 = Q_r,  A0 = R_r,    W = Q R

Q_r is the orthonormal basis of the first r columns of W, so only those are decomposed: R_r = Q_r^T W.

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", section 3.
"""

import torch

from eckart.hosts import Adapter
from eckart.maps import LowRank
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, moved_start


def olora(*, rank: int = 16, alpha: float = 16.0) -> Recipe:
    """LoRA started from an orthonormal basis of the weight's first columns.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        weight = layer.weight()
        basis = torch.linalg.qr(weight[:, : layer.fitting(rank)]).Q
        return moved_start(LowRank(basis, basis.mT @ weight), alpha / rank)

    return Recipe(build, rate=3e-4)
