"""PiSSA: LoRA that starts from the principal singular triplets of the weight.

    W' = W - s B0 A0 + s B A,    B0 = U_r (S_r / s)^(1/2),  A0 = (S_r / s)^(1/2) V_r^T,    W = U S V^T,  s = alpha / r

The base keeps its bytes: the start is subtracted by a frozen change, so that the adapter fits the untouched model.

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", eq. 2-4; alpha = r.
"""

from eckart.hosts import Adapter
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, moved_start, root_split


def pissa(*, rank: int = 16, alpha: float = 16.0) -> Recipe:
    """LoRA started from the principal singular triplets of the weight.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
    """
    check_rank(rank)
    scale = alpha / rank

    def build(layer: Layer) -> Adapter:
        found = layer.svd(layer.fitting(rank))
        return moved_start(root_split(found.left, found.values, found.right, scale), scale)

    return Recipe(build, rate=3e-4)
