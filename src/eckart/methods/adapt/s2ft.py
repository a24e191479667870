"""S2FT: one dense block of channels of every layer trains.

    outputs: y += E_c (D x),  D (k, n)        inputs: y += D x_c,  D (m, k)        c the chosen channels

The layers of one module that have as many outputs, or inputs, choose the same channels: in an MLP the hidden units of
up, gate and down. The paper permutes the weights so that they lie side by side; here x_c is gathered and E_c placed,
so the weights keep their order.

Structure: a block of rows or columns added. Start: W. Trained: D; k n or k m numbers.

Source: Yang et al. 2024, "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity". Heads
are not kept whole in attention, and which side of which layer the paper trains is not verified: `side` says it.
"""

from typing import Literal

import torch

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Dense, Placement, Product, Selection
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe
from eckart.methods.adapt.support import chosen_channels


def s2ft(
    *,
    channels: int = 32,
    side: Literal["wider", "outputs", "inputs"] = "wider",
    select: Literal["random", "norm"] = "random",
) -> Recipe:
    """Train one dense block of channels of every layer.

    Args:
        channels: k.
        side: whether rows or columns train; "wider" takes the longer side, inputs of a square layer.
        select: "random" channels, or those of the largest "norm".
    """
    if channels < 1:
        raise EckartError(f"channels must be at least 1, got {channels}")

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        chosen_side = ("outputs" if m > n else "inputs") if side == "wider" else side
        chosen = chosen_channels(layer, channels, chosen_side, by_norm=select == "norm")
        if chosen_side == "outputs":
            block = torch.zeros(channels, n, device=layer.device)
            return Adapter([Plus(Product((Placement(chosen, m), Dense(block))))])
        block = torch.zeros(m, channels, device=layer.device)
        return Adapter([Plus(Product((Dense(block), Selection(chosen, n))))])

    return Recipe(build, rate=2e-4)
