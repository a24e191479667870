"""eckart-mixed: the structure is chosen from layer to layer, by the same predicted loss.

    one knapsack over all layers and all their options: every rank of a pivoted map, dictionaries with sparse codes at
    two sparsities, and low rank plus sparse, each at fifteen sizes and with E | T (W z - W' x^) |^2 of the map fitted

Metric, anchor and sequential re-measuring are those of `eckart`; losses of the other families are not known in closed
form, so they are fitted at every size offered. Codes come from orthogonal atoms (hard thresholding and Procrustes in
turn, far faster than K-SVD for most of its gain), atoms from the closed form under the whole metric.

Under a budget over bytes, codes take the place of these families: every row of every matrix gets 2, 3, 4, 5, 6 or 8
bits (fit/widths.py), so that one knapsack says how many bits each layer gets, and another which of its rows get them.

Structure: pivoted low rank, dictionary with sparse codes, low rank plus sparse, or dense, or rows of codes; embeddings
included. Budget: knapsack on predicted loss. Trained: nothing.
"""

import dataclasses

from eckart.fit.dictionary import orthogonal_learner
from eckart.fit.families import dictionary_family, sparse_plus_lowrank_family
from eckart.maps import BITS
from eckart.methods.compress.eckart import eckart
from eckart.methods.compress.recipe import Recipe, check_least

RATIOS = (2.0, 3.0)


def eckart_mixed(
    *, anchor: float = 0.3, input_shrinkage: float = 0.01, output_shrinkage: float = 0.03, iterations: int = 10
) -> Recipe:
    """Pivoted maps, dictionaries, and low rank plus sparse in one knapsack, on the metric of eckart.

    Args:
        anchor: share of the original output in the target of a layer; the rest is its own output on what it sees.
        input_shrinkage: share of the isotropic moment in the input moments.
        output_shrinkage: share of the isotropic moment in the output-gradient moment.
        iterations: rounds of learning codes, or entries, and what they multiply.
    """
    check_least("iterations", iterations, 1)
    recipe = eckart(anchor=anchor, input_shrinkage=input_shrinkage, output_shrinkage=output_shrinkage)
    learner = orthogonal_learner(iterations)
    families = tuple(dictionary_family(learner, ratio, f"dictionary {ratio:g}:1") for ratio in RATIOS)
    sparse = sparse_plus_lowrank_family(iterations=iterations)
    return dataclasses.replace(recipe, families=(*families, sparse), mixed=True, widths=BITS, symmetric=True)
