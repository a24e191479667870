"""LoRA-XS: only a small square matrix between the frozen singular vectors of the weight trains.

    W' = W + (alpha / r) U_r R S_r V_r^T,    R (r, r) ~ N(0, 1e-5^2)

Structure: product of three, the outer two frozen. Start: W to 1e-5. Trained: R; r^2 numbers, whatever the layer's size.

Source: Bałazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", section 3.
"""

from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Dense, Product
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, train_only

SPREAD = 1e-5


def lora_xs(*, rank: int = 16, alpha: float = 16.0) -> Recipe:
    """A trained r x r matrix between the frozen singular vectors of the weight.

    Args:
        rank: r.
        alpha: the added map is scaled by alpha / r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        found = layer.svd(layer.fitting(rank))
        core = Dense(SPREAD * layer.normal(found.rank, found.rank))
        change = Plus(Product((Dense(found.left), core, Dense(found.values[:, None] * found.right))), alpha / rank)
        return Adapter([train_only(change, "delta.1.")])

    return Recipe(build, rate=3e-3)
