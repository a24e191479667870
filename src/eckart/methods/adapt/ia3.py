"""(IA)^3: a number for every output, or for every input, of a layer.

    W' = diag(l) W        or        W' = W diag(l)

The paper scales the outputs of the layers key and value and the inputs of the second layer of an MLP:
targets=["k_proj", "v_proj", "down_proj"]. A bias is not scaled.

Structure: diagonal matrix times W. Start: W, with l = 1. Trained: l; m or n numbers.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
section 3.3; rate 3e-3.
"""

from typing import Literal

import torch

from eckart.hosts import Adapter
from eckart.hosts.adapter import Left, Times
from eckart.maps import Diagonal
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe


def ia3(*, side: Literal["wider", "outputs", "inputs"] = "wider") -> Recipe:
    """A number for every output, or for every input, of a layer.

    Args:
        side: which are scaled; "wider" means the inputs of layers that have more inputs than outputs, such as the
            second of an MLP, and the outputs of others.
    """

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        inputs = side == "inputs" or (side == "wider" and n > m)
        ones = Diagonal(torch.ones(n if inputs else m, device=layer.device))
        return Adapter([Times(ones) if inputs else Left(ones)])

    return Recipe(build, rate=3e-3)
