"""HRA: a chain of trained reflections before the layer.

    W' = W H_1 H_2 ... H_r,    H_i = I - 2 u_i u_i^T / |u_i|^2

Vectors start equal in pairs, whose reflections undo each other. The chain is applied in the compact WY form, two thin
products (maps/orthogonal.py), and W is only called, so it may be of any structure.

Structure: reflections before W. Start: W. Trained: u; r n numbers.

Source: Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
Adaptation", section 3; r = 8.
"""

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Times
from eckart.maps import Householder
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def hra(*, rank: int = 8) -> Recipe:
    """Trained reflections before the layer.

    Args:
        rank: number of reflections r; even, since they start in pairs that cancel.
    """
    check_rank(rank)
    if rank % 2:
        raise EckartError(f"rank must be even for hra, whose reflections start in pairs that cancel, got {rank}")

    def build(layer: Layer) -> Adapter:
        half = layer.uniform(rank // 2, layer.shape[1])
        return Adapter([Times(Householder(half.repeat_interleave(2, dim=0)))])

    return Recipe(build, rate=1e-3)
