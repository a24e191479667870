"""eckart: everything the closed form can use, stored without redundancy, with ranks that minimise the predicted loss.

    min over rank W' <= k (and c) of  E | T ( W z - W' x^ - c ) |^2,   z = anchor x + (1 - anchor) x^,  T^T T = E[g g^T]
    in nats: the loss grows by about half of that error, so ranks of all layers come from one knapsack

- Complete regression: shifted inputs and output-gradient metric together. A fitted bias is a third gain at equal rank,
  but at equal size the rank its m numbers buy is worth more on all models tried, so it is off by default.
- The gradients use labels drawn from the model itself, so the metric is the Fisher matrix: predictions come out in nats
  and need no probing; on small models the sum over layers was within a factor of 1.4 of the measured increase.
- Token embeddings take part. A tied head shares the embedding's row metric (how often a token occurs or is predicted),
  so both uses add up to one Kronecker metric and have one closed form.
- Pivoted storage: k (m + n - k) numbers for rank k.
- Sequential re-measuring: every layer is fitted on what it really sees. A full anchor over-corrects (regression
  shrinks towards the mean, layer after layer); 0.3 was best or within noise on all models tried (docs/LOG.md).

Structure: pivoted low rank or dense, embeddings included. Budget: knapsack on predicted loss. Trained: nothing.
"""

from eckart.fit import Metric
from eckart.fit import metric as build_metric
from eckart.methods.compress.recipe import (
    LayerData,
    Recipe,
    check_share,
    gradient_moment,
    joint_moments,
    raw_moments,
)


def eckart(
    *, anchor: float = 0.3, input_shrinkage: float = 0.01, output_shrinkage: float = 0.03, bias: bool = False
) -> Recipe:
    """Complete reduced-rank regression, pivoted storage, knapsack on predicted loss, sequential re-measuring.

    Args:
        anchor: share of the original output in the target of a layer; the rest is its own output on what it sees.
        input_shrinkage: share of the isotropic moment in the input moments.
        output_shrinkage: share of the isotropic moment in the output-gradient moment.
        bias: whether compressed layers get a fitted bias (m numbers, counted).
    """
    for name, value in (
        ("anchor", anchor),
        ("input_shrinkage", input_shrinkage),
        ("output_shrinkage", output_shrinkage),
    ):
        check_share(name, value)

    def metric(data: LayerData) -> Metric:
        outputs = gradient_moment(data)
        if data.cross is None:  # before the sequential pass, and for embeddings
            mean, second = raw_moments(data)
            return build_metric(
                second,
                mean=mean if bias else None,
                outputs=outputs,
                input_shrinkage=input_shrinkage,
                output_shrinkage=output_shrinkage,
            )
        (original, cross), shifted = joint_moments(data.cross), data.cross.shifted
        return build_metric(
            original.second,
            mean=original.mean if bias else None,
            shifted=shifted.second,
            cross=cross,
            shifted_mean=shifted.mean if bias else None,
            outputs=outputs,
            input_shrinkage=input_shrinkage,
            output_shrinkage=output_shrinkage,
            anchor=anchor,
        )

    return Recipe(
        metric=metric,
        allocation="knapsack",
        storage="pivoted",
        embeddings=True,
        uses_inputs=True,
        uses_gradients=True,
        labels="sampled",
        output_metric=True,
        centred=bias,
        sequential=True,
    )
