"""LoRD: low-rank decomposition of all linear layers by their output covariance, one rank reduction for all.

    the decomposition of AFM, W' = U_k U_k^T W with U from the covariance of the output;
    k = (1 - reduction) min(m, n) for every layer, and a layer that this does not make smaller stays dense

Structure: low rank with bias. Metric: centred input covariance. Budget: one share of rank. Solver: eigen-decomposition.
Trained: nothing.

Source: Kaushal et al. 2023, "LoRD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression". The paper
states rank reductions common to all layers (up to 39.58 %, at which square projections of its models would not shrink);
its exact decomposition was not available in code, and output-covariance decomposition is what its text describes.
"""

from eckart.methods.compress.afm import output_covariance
from eckart.methods.compress.recipe import Recipe


def lord() -> Recipe:
    """Output-covariance decomposition with one rank reduction for all layers."""
    return Recipe(metric=output_covariance, allocation="uniform-rank", uses_inputs=True, centred=True)
