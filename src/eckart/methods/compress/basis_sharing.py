"""Basis Sharing: adjacent layers have one basis at their input side, and coefficients of their own.

    S S^T = sum_i E[x_i x_i^T],    [W_1; ...; W_g] S ~ U_k V_k,    W_i' = U_i D,  D = V_k S^(-1) stored once

- Shared among g adjacent blocks: q, k, v, gate, up. Projections that write to the residual stream (o, down) stay
  private; the paper found that sharing them costs too much.
- `rounds` above 0 replaces the common moment by each layer's own, which the paper does not do: coefficients and basis
  are refitted in turn (fit/shared.py). `writers` shares o and down as well, which pays with such rounds.
- Smaller is not faster here: sharing buys rank, and a layer of rank k multiplies k (m + n) numbers per token, which
  for a group of 2 square layers is more than the dense m n above three quarters of the numbers.

Structure: low rank with a shared right factor; o and down low rank of their own. Metric: input second moment, summed
over a group. Budget: uniform, a group as one layer with one basis. Solver: SVD. Trained: nothing (the paper's LoRA
healing is separate).

Source: Wang et al. 2024, "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression"
(arXiv 2410.03765; TUDa-HWAI/Basis_Sharing): groups of 2 by default.
"""

from eckart.methods.compress.recipe import Recipe, check_least, input_moment
from eckart.methods.compress.sharing import Sharing


def basis_sharing(*, group: int = 2, writers: bool = False, rounds: int = 0) -> Recipe:
    """One input-side basis for the same projection of adjacent blocks, from the SVD of the whitened, stacked weights.

    Args:
        group: adjacent layers that share a basis.
        writers: whether projections that write to the residual stream (o, down) share too.
        rounds: alternations under each layer's own input moment; 0 for the common one.
    """
    check_least("group", group, 2)
    return Recipe(metric=input_moment, uses_inputs=True, sharing=Sharing(size=group, writers=writers, rounds=rounds))
