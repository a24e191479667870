"""LIFT: the entries that are largest in a low-rank approximation of the weight train.

    W' = W + P,    P zero outside of the k (m + n) largest |W'_r|,    W'_r the best approximation of W' of rank r

The gradient of P is sampled at those places and no dense one is kept (maps/support.py). Every `refresh` steps the
places are selected anew from W' as it is then. What was learned at places that leave stays, as it does in the paper,
whose weight is changed itself: here in a second sparse change, which is frozen. At places that stay the optimizer keeps
its moments, at new ones they are zero. A support of gradients stays, since gradients elsewhere are not known; "Refining
Salience-Aware Sparse Fine-Tuning Strategies for Language Models" finds that as good for those.

Moves between optimizer steps: trained without `adapters(model).follow(optimizer, steps)` its first support stays.

Structure: sparse values added. Start: W. Trained: P on the support; k (m + n) numbers, as many as LoRA of rank k.

Source: Liu et al. 2025, "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
Reasoning-Focused Supervised Fine-Tuning"; r = k = 128, and a refresh every 400 steps as in most runs of its published
code (r up to 64 on smaller models, and 2,000 steps on more data).
"""

from eckart.errors import EckartError
from eckart.hosts import Adapter, leaf, map_of
from eckart.methods.adapt.between import Behind, Between
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank
from eckart.methods.adapt.support import Selector, added_on, largest, make_room, move_support, scores


def lift(*, rank: int = 128, budget: int = 128, select: Selector = "principal", refresh: int = 400) -> Recipe:
    """Train the entries that are largest in a low-rank approximation of the weight.

    Args:
        rank: r, of the approximation.
        budget: k; as many entries train as LoRA of this rank would.
        select: what makes an entry train: "principal" as above, large "magnitude", "small" magnitude, large
            "gradient" of the loss (needs data), or "random".
        refresh: steps between two selections; 0 for one at the start alone.
    """
    check_rank(rank)
    if budget < 1 or refresh < 0:
        raise EckartError(f"budget must be at least 1 and refresh not negative, got {budget} and {refresh}")

    def selected(layer: Layer) -> Adapter:
        return Adapter([added_on(largest(layer, scores(layer, select, rank), budget * sum(layer.shape)))])

    def prepare(layer: Layer, adapter: Adapter, steps: int) -> None:
        if steps > refresh:
            make_room(adapter)

    def behind(layer: Layer, adapter: Adapter, at: Behind) -> None:
        done = at.index + 1
        if done % refresh == 0 and done < at.steps:
            weight = adapter.of(map_of(layer.module)).dense().float()
            now = Layer(layer.name, leaf(weight).requires_grad_(False), layer.seed + done)
            chosen = largest(now, scores(now, select, rank), budget * sum(layer.shape))
            move_support(adapter, chosen, at.optimizer)

    moves = Between(prepare, behind) if refresh and select != "gradient" else None
    return Recipe(selected, rate=2e-4, uses_gradients=select == "gradient", between=moves)
