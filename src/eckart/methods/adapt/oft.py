"""OFT: a trained rotation of blocks of the inputs.

    W' = W blockdiag(R_1, ..., R_b),    R_i = (I + Q_i)(I - Q_i)^-1,   Q_i skew-symmetric, 0 at the start

The Cayley transform is solved exactly, so every R_i is orthogonal however far it has moved.

Structure: rotations before W. Start: W. Trained: Q; n (s - 1) / 2 numbers.

Source: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", section 3.2; on the input side
as in its second version; blocks of 32.
"""

import torch

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Times
from eckart.maps import Cayley
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe


def oft(*, block: int = 32) -> Recipe:
    """A trained rotation of blocks of the inputs.

    Args:
        block: side s of a block; must divide the inputs of every layer.
    """
    if block < 2:
        raise EckartError(f"block must be at least 2, got {block}")

    def build(layer: Layer) -> Adapter:
        n = layer.shape[1]
        if n % block:
            raise EckartError(f"blocks of {block} do not divide the {n} inputs of {layer.name}; choose a divisor")
        return Adapter([Times(Cayley(torch.zeros(n // block, block * (block - 1) // 2, device=layer.device), block))])

    return Recipe(build, rate=1e-3)
