"""FFA-LoRA: LoRA whose first factor stays as it was drawn, so that averages of clients' changes are exact.

    W' = W + (alpha / r) B A,    A fixed:    mean_i B_i A = (mean_i B_i) A

which two trained factors do not have: mean_i B_i A_i is not (mean_i B_i) (mean_i A_i). Noise on the gradient of B
enters W' linearly, and is not multiplied by noise on A.

Structure: low rank added, its first factor frozen. Start: W. Trained: B = 0 at the start; m r numbers.

Source: Sun, Li, Li and Ding 2024, "Improving LoRA in Privacy-preserving Federated Learning".
"""

from eckart.hosts import Adapter
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, added, check_rank, train_only


def ffa_lora(*, rank: int = 8, alpha: float = 8.0) -> Recipe:
    """LoRA whose first factor stays as it was drawn.

    Args:
        rank: r.
        alpha: the added map is scaled by alpha / r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        return Adapter([train_only(added(layer, rank, alpha / rank), "delta.up.")])

    return Recipe(build, rate=1e-3)
