"""The same share for every layer: of its numbers, or of its rank."""

from collections.abc import Callable, Sequence

from eckart.budget.candidates import Candidates, Option, require_reachable


def uniform(layers: Sequence[Candidates], budget: int) -> dict[str, Option]:
    """Give every layer the largest option within one common share of its dense numbers; what rounding leaves is spent
    on the layers furthest below that share, one rank each.

    Args:
        layers: candidates.
        budget: numbers all layers may store together.

    Raises:
        EckartError: if the cheapest options exceed the budget.
    """
    require_reachable(layers, budget)
    share = largest_share(lambda s: within(layers, [s] * len(layers)), layers, budget)
    shares = [share] * len(layers)
    return filled(layers, within(layers, shares), shares, budget)


def uniform_rank(layers: Sequence[Candidates], budget: int) -> dict[str, Option]:
    """Reduce every rank to one common share of full rank; a layer that this does not make smaller stays dense.

    Args:
        layers: candidates.
        budget: numbers all layers may store together.

    Raises:
        EckartError: if the cheapest options exceed the budget.

    Source: Kaushal et al. 2023, "LoRD", which states rank reductions common to all linear layers.
    """
    require_reachable(layers, budget)

    chosen = [0] * len(layers)
    left = budget - _numbers(layers, chosen)
    stuck: set[int] = set()
    # The share rises step by step; a layer whose next step does not fit stays, the others may use what is left.
    for _, i, at in sorted(
        (_share_of_rank(layer, at), i, at) for i, layer in enumerate(layers) for at in range(1, len(layer.options))
    ):
        step = layers[i].options[at].numbers - layers[i].options[at - 1].numbers
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


def within(layers: Sequence[Candidates], shares: Sequence[float]) -> list[int]:
    """Return the index of every layer's largest option within its share of its dense numbers, or of the cheapest."""
    return [
        max((i for i, o in enumerate(c.options) if o.numbers <= share * c.dense.numbers + 1e-9), default=0)
        for c, share in zip(layers, shares, strict=True)
    ]


def filled(
    layers: Sequence[Candidates], chosen: Sequence[int], shares: Sequence[float], budget: int
) -> dict[str, Option]:
    """Spend what rounding left of a budget on the layers furthest below their shares, one option each.

    Args:
        layers: candidates.
        chosen: index of the option of each.
        shares: the share of its dense numbers each should have.
        budget: numbers all layers may store together.
    """
    at, left = list(chosen), budget - _numbers(layers, chosen)

    def lack(i: int) -> float:
        return layers[i].options[at[i]].numbers / layers[i].dense.numbers - shares[i]

    for i in sorted(range(len(layers)), key=lack):
        options = layers[i].options
        if at[i] + 1 < len(options) and options[at[i] + 1].numbers - options[at[i]].numbers <= left:
            left -= options[at[i] + 1].numbers - options[at[i]].numbers
            at[i] += 1
    return {layer.name: layer.options[i] for layer, i in zip(layers, at, strict=True)}


def largest_share(choose: Callable[[float], list[int]], layers: Sequence[Candidates], budget: int) -> float:
    """Return the largest share in [0, 1] whose choice fits the budget, by bisection."""
    low, high = 0.0, 1.0
    if _numbers(layers, choose(high)) <= budget:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _numbers(layers, choose(middle)) <= budget else (low, middle)
    return low


def _numbers(layers: Sequence[Candidates], chosen: Sequence[int]) -> int:
    return sum(layer.options[at].numbers for layer, at in zip(layers, chosen, strict=True))
