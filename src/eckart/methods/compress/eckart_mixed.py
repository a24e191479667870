"""eckart-mixed: the structure is chosen from layer to layer, by the same predicted loss.

    one knapsack over all layers and all their options: every rank of a pivoted map, dictionaries with sparse codes,
    sparse maps, and low rank plus sparse, each at fifteen sizes and with E | T (W z - W' x^) |^2 of the map fitted

Metric, anchor and sequential re-measuring are those of `eckart`; losses of the other families are not known in closed
form, so they are fitted at every size offered. Places of entries come from ADMM, codes from orthogonal atoms (hard
thresholding and Procrustes in turn, far faster than K-SVD for most of its gain); what was chosen is then improved by
least squares on all of its entries under the whole metric (fit/pruned.py).

Under a budget over bytes, codes take the place of these families: every row of every matrix gets 2, 3, 4, 5, 6 or 8
bits (fit/widths.py), so that one knapsack says how many bits each layer gets, and another which of its rows get them.
The codes chosen are improved column by column under the whole metric (fit/descent.py).

Three more families gained nothing at equal numbers on the trained models tried (docs/LOG.md) and are offered if asked
for: `period`, maps with N of every M entries; `kronecker`, sums of near-square Kronecker products; `neurons`, fewer
hidden units in a whole MLP, as in `modegpt`: gate and up keep the rows of the k units of largest leverage, down
is refitted to them, all stay dense. An MLP gets either that, or maps of its layers: what these lose together, along the
sum of their convex hulls, is compared with what down then loses under the same metric (budget/together.py). Under a
budget over latency it is offered unasked: narrow dense layers are fast where sparse maps are not.

Structure: pivoted low rank, dictionary with sparse codes, sparse, low rank plus sparse, or dense; or rows of codes.
Embeddings are pivoted, or rows of codes. Asked for: N:M, Kronecker products, fewer hidden units. Budget: knapsack on
predicted loss. Trained: nothing.
"""

import dataclasses
from typing import Literal

from eckart.errors import EckartError
from eckart.fit.dictionary import orthogonal_learner
from eckart.fit.families import (
    dictionary_family,
    kronecker_family,
    n_of_m_family,
    sparse_family,
    sparse_plus_lowrank_family,
)
from eckart.fit.pruned import improve_entries
from eckart.maps import BITS
from eckart.methods.compress.eckart import eckart
from eckart.methods.compress.recipe import Recipe, check_least

Neurons = Literal["latency", "always", "never"]
# Atoms per non-zero of the dictionaries.
RATIO = 2.0


def eckart_mixed(
    *,
    anchor: float = 0.3,
    input_shrinkage: float = 0.01,
    output_shrinkage: float = 0.03,
    iterations: int = 10,
    period: int = 0,
    kronecker: bool = False,
    neurons: Neurons = "latency",
) -> Recipe:
    """Pivoted maps, dictionaries, sparse maps, low rank plus sparse, and rows of codes in one knapsack.

    Args:
        anchor: share of the original output in the target of a layer; the rest is its own output on what it sees.
        input_shrinkage: share of the isotropic moment in the input moments.
        output_shrinkage: share of the isotropic moment in the output-gradient moment.
        iterations: rounds of learning codes, or entries, and what they multiply.
        period: if not 0, M of the maps N:M that are offered as well; those with 4 are what GPUs have units for.
        kronecker: whether sums of Kronecker products are offered as well.
        neurons: when MLPs may get fewer hidden units instead of maps of their layers: under a budget over "latency",
            "always" or "never".
    """
    check_least("iterations", iterations, 1)
    if not (period == 0 or 2 <= period <= 256):
        raise EckartError(f"period must be 0, for no maps N:M, or 2 to 256, got {period}")
    recipe = eckart(anchor=anchor, input_shrinkage=input_shrinkage, output_shrinkage=output_shrinkage)
    learner = orthogonal_learner(iterations)
    families = [dictionary_family(learner, RATIO), sparse_plus_lowrank_family(iterations=iterations), sparse_family()]
    families += [n_of_m_family(period)] if period else []
    improved = [dataclasses.replace(family, finish=improve_entries) for family in families]
    improved += [kronecker_family()] if kronecker else []
    return dataclasses.replace(
        recipe,
        families=tuple(improved),
        mixed=True,
        neurons=neurons == "always",
        widths=BITS,
        symmetric=True,
        neurons_for_latency=neurons == "latency",
    )
