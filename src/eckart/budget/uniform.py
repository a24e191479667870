"""The same share for every layer: of its cost, or of its rank."""

from collections.abc import Callable, Sequence

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
    share = largest_share(lambda s: within(layers, [s] * len(layers), measure), layers, budget, measure)
    shares = [share] * len(layers)
    return filled(layers, within(layers, shares, measure), shares, budget, measure)


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


def within(layers: Sequence[Candidates], shares: Sequence[float], measure: Measure = NUMBERS) -> list[int]:
    """Return the index of every layer's largest option within its share of its dense cost, or of the cheapest."""
    return [
        max((i for i, o in enumerate(c.options) if _share(c, o, measure) <= share * (1 + 1e-12)), default=0)
        for c, share in zip(layers, shares, strict=True)
    ]


def filled(
    layers: Sequence[Candidates],
    chosen: Sequence[int],
    shares: Sequence[float],
    budget: float,
    measure: Measure = NUMBERS,
) -> dict[str, Option]:
    """Spend what rounding left of a budget on the layers furthest below their shares, one option each.

    Args:
        layers: candidates.
        chosen: index of the option of each.
        shares: the share of its dense cost each should have.
        budget: what all layers may cost together.
        measure: what is counted; options ascend in it.
    """
    at, left = list(chosen), budget - _cost(layers, chosen, measure)

    def lack(i: int) -> float:
        return _share(layers[i], layers[i].options[at[i]], measure) - shares[i]

    for i in sorted(range(len(layers)), key=lack):
        options = layers[i].options
        if at[i] + 1 < len(options) and (step := measure.of(options[at[i] + 1]) - measure.of(options[at[i]])) <= left:
            left -= step
            at[i] += 1
    return {layer.name: layer.options[i] for layer, i in zip(layers, at, strict=True)}


def _cost(layers: Sequence[Candidates], chosen: Sequence[int], measure: Measure) -> float:
    return sum(measure.of(layer.options[at]) for layer, at in zip(layers, chosen, strict=True))


def largest_share(
    choose: Callable[[float], list[int]], layers: Sequence[Candidates], budget: float, measure: Measure = NUMBERS
) -> float:
    """Return the largest share in [0, 1] whose choice fits the budget, by bisection."""
    low, high = 0.0, 1.0
    if _cost(layers, choose(high), measure) <= budget:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cost(layers, choose(middle), measure) <= budget else (low, middle)
    return low
