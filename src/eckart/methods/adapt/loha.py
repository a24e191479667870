"""LoHa: the product of two low-rank matrices, entry by entry, added.

    W' = W + (alpha / r) (B1 A1) * (B2 A2)

of rank up to r^2. Where r^2 is small beside m and n, it is applied as two thin matrices with r^2 columns
(maps/thin.py); elsewhere it is written out a block of rows at a time and never kept (maps/hadamard.py).

Structure: Hadamard product added. Start: W, with A2 = 0, the others uniform in +-1 over the root of their inputs.
Trained: A1, B1, A2, B2; 2 r (m + n) numbers.

Source: Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", as
an adapter Yeh et al. 2024 (LyCORIS); which factor starts at 0 as in PEFT.
"""

import torch

from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Hadamard, LowRank
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def loha(*, rank: int = 8, alpha: float = 8.0) -> Recipe:
    """The product of two low-rank matrices, entry by entry, added.

    Args:
        rank: r, of each of them.
        alpha: their product is scaled by alpha / r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        (m, n), r = layer.shape, layer.fitting(rank)
        drawn = layer.uniform(2 * m + n, r)
        first = LowRank(drawn[:m] / r**0.5, drawn[2 * m :].mT / n**0.5)
        second = LowRank(drawn[m : 2 * m] / r**0.5, torch.zeros(r, n, device=layer.device))
        return Adapter([Plus(Hadamard(first, second), alpha / rank)])

    return Recipe(build, rate=1e-3)
