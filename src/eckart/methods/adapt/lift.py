"""LIFT: the entries that are largest in a low-rank approximation of the weight train.

    W' = W + P,    P zero outside of the k (m + n) largest |W_r|,    W_r the best approximation of W of rank r

The gradient of P is sampled at those places and no dense one is kept (maps/support.py). The paper selects anew every
K steps; here the support stays, which "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models" finds
as good for scores of gradients; those can be chosen as well.

Structure: sparse values added. Start: W. Trained: P on the support; k (m + n) numbers, as many as LoRA of rank k.

Source: Liu et al. 2025, "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
Reasoning-Focused Supervised Fine-Tuning"; r = k = 128.
"""

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank
from eckart.methods.adapt.support import Selector, added_on, largest, scores


def lift(*, rank: int = 128, budget: int = 128, select: Selector = "principal") -> Recipe:
    """Train the entries that are largest in a low-rank approximation of the weight.

    Args:
        rank: r, of the approximation.
        budget: k; as many entries train as LoRA of this rank would.
        select: what makes an entry train: "principal" as above, large "magnitude", "small" magnitude, large
            "gradient" of the loss (needs data), or "random".
    """
    check_rank(rank)
    if budget < 1:
        raise EckartError(f"budget must be at least 1, got {budget}")

    def build(layer: Layer) -> Adapter:
        return Adapter([added_on(largest(layer, scores(layer, select, rank), budget * sum(layer.shape)))])

    return Recipe(build, rate=2e-4, uses_gradients=select == "gradient")
