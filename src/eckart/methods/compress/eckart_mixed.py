"""eckart-mixed: the structure is chosen from layer to layer, by the same predicted loss.

    one knapsack over all layers and all their options: every rank of a pivoted map, and dictionaries with sparse codes
    at fifteen sizes and two sparsities, each with E | T (W z - W' x^) |^2 of the map really fitted

Metric, anchor and sequential re-measuring are those of `eckart`; the loss of a dictionary is not known in closed form,
so it is fitted at every size offered. Codes come from orthogonal atoms (hard thresholding and Procrustes in turn: 50
times as fast as K-SVD for most of its gain), atoms from the closed form under the whole metric.

Structure: pivoted low rank, dictionary with sparse codes, or dense, embeddings included. Budget: knapsack on predicted
loss. Trained: nothing.
"""

import dataclasses

from eckart.errors import EckartError
from eckart.fit.dictionary import orthogonal_learner
from eckart.fit.families import dictionary_family
from eckart.methods.compress.eckart import eckart
from eckart.methods.compress.recipe import Recipe

RATIOS = (2.0, 3.0)


def eckart_mixed(
    *, anchor: float = 0.3, input_shrinkage: float = 0.01, output_shrinkage: float = 0.03, iterations: int = 10
) -> Recipe:
    """Pivoted maps and dictionaries in one knapsack, on the metric of eckart.

    Args:
        anchor: share of the original output in the target of a layer; the rest is its own output on what it sees.
        input_shrinkage: share of the isotropic moment in the input moments.
        output_shrinkage: share of the isotropic moment in the output-gradient moment.
        iterations: rounds of thresholding and rotating.
    """
    if iterations < 0:
        raise EckartError(f"iterations must not be negative, got {iterations}")
    recipe = eckart(anchor=anchor, input_shrinkage=input_shrinkage, output_shrinkage=output_shrinkage)
    learner = orthogonal_learner(iterations)
    families = tuple(dictionary_family(learner, ratio, f"dictionary {ratio:g}:1") for ratio in RATIOS)
    return dataclasses.replace(recipe, families=families, mixed=True)
