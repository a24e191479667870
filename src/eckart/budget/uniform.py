"""The same share for every layer: of its cost, or of its rank."""

from collections.abc import Sequence

from eckart.budget.candidates import NUMBERS, Candidates, Measure, Option, require_reachable


def uniform(layers: Sequence[Candidates], budget: float, measure: Measure = NUMBERS) -> dict[str, Option]:
    """Give every layer the largest option within one common share of its dense cost; what rounding leaves is spent
    on the layers furthest below that share, one rank each.

    Args:
        layers: candidates.
        budget: what all layers may cost together.
        measure: what is counted; options ascend in it.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    require_reachable(layers, budget, measure)
    chosen = _within(layers, _largest_share(layers, budget, measure), measure)
    left = budget - _cost(layers, chosen, measure)
    for i in sorted(range(len(layers)), key=lambda i: _share(layers[i], layers[i].options[chosen[i]], measure)):
        options, at = layers[i].options, chosen[i]
        if at + 1 < len(options) and (step := measure.of(options[at + 1]) - measure.of(options[at])) <= left:
            left -= step
            chosen[i] = at + 1
    return {layer.name: layer.options[at] for layer, at in zip(layers, chosen, strict=True)}


def uniform_rank(layers: Sequence[Candidates], budget: float, measure: Measure = NUMBERS) -> dict[str, Option]:
    """Reduce every rank to one common share of full rank; a layer that this does not make smaller stays dense.

    Args:
        layers: candidates.
        budget: what all layers may cost together.
        measure: what is counted; options ascend in it.

    Raises:
        EckartError: if the cheapest options exceed the budget.

    Source: Kaushal et al. 2023, "LoRD", which states rank reductions common to all linear layers.
    """
    require_reachable(layers, budget, measure)

    chosen = [0] * len(layers)
    left = budget - _cost(layers, chosen, measure)
    stuck: set[int] = set()
    # The share rises step by step; a layer whose next step does not fit stays, the others may use what is left.
    for _, i, at in sorted(
        (_share_of_rank(layer, at), i, at) for i, layer in enumerate(layers) for at in range(1, len(layer.options))
    ):
        step = measure.of(layers[i].options[at]) - measure.of(layers[i].options[at - 1])
        if i in stuck or step > left:
            stuck.add(i)
            continue
        left -= step
        chosen[i] = at
    return {layer.name: layer.options[at] for layer, at in zip(layers, chosen, strict=True)}


def _share_of_rank(layer: Candidates, at: int) -> float:
    """Return the share of full rank at which an option is reached; a layer is dense beyond its largest rank."""
    option, before = layer.options[at], layer.options[at - 1]
    return (option.rank if option is not layer.dense else before.rank + 1) / min(layer.shape)


def _share(layer: Candidates, option: Option, measure: Measure) -> float:
    """Return an option's share of the dense cost; 1 for a layer that costs nothing."""
    return measure.of(option) / measure.of(layer.dense) if measure.of(layer.dense) else 1.0


def _within(layers: Sequence[Candidates], share: float, measure: Measure) -> list[int]:
    """Return the index of every layer's largest option within a share of its dense cost (the cheapest at least)."""
    return [
        max((i for i, o in enumerate(c.options) if _share(c, o, measure) <= share * (1 + 1e-12)), default=0)
        for c in layers
    ]


def _cost(layers: Sequence[Candidates], chosen: Sequence[int], measure: Measure) -> float:
    return sum(measure.of(layer.options[at]) for layer, at in zip(layers, chosen, strict=True))


def _largest_share(layers: Sequence[Candidates], budget: float, measure: Measure) -> float:
    """Return the largest share in [0, 1] whose choice fits the budget, by bisection."""
    low, high = 0.0, 1.0
    if _cost(layers, _within(layers, high, measure), measure) <= budget:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        fits = _cost(layers, _within(layers, middle, measure), measure) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low
