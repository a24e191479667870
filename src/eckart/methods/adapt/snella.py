"""SNELLA: the entries of a kernel matrix that are large enough are added.

    W' = W + K * |K| where |K| >= q, W elsewhere,    K_ij = 0.1 (|a_j - b_i| - |c_j - d_i|)

a, b, c, d are vectors of r / 2 numbers, one of each kind per input (a, c) and output (b, d); q is the quantile of |K|
above which entries count, found anew in every step and constant to autograd, as is the factor |K|. K is written out
block by block and never kept (hosts/entrywise.py).

Structure: sparse kernel matrix added. Start: near W. Trained: a, b, c, d; r (m + n) numbers.

Source: Shen et al. 2024, "Expanding Sparse Tuning for Low Memory Usage" (SNELL), and its published code, for the
kernel. What SNELLA adds, a softmax of K and shares of entries that are allocated to layers in training, is not verified
and left out: every layer has one share.
"""

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.entrywise import Kernel
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def snella(*, rank: int = 8, density: float = 0.1) -> Recipe:
    """A sparse kernel matrix of two low-rank pairs added.

    Args:
        rank: r, even.
        density: share of the entries that are changed.
    """
    check_rank(rank)
    if rank % 2 or not 0 < density <= 1:
        raise EckartError(f"rank must be even and density above 0 and at most 1, got {rank} and {density}")

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        half = rank // 2
        drawn = layer.uniform(2 * half * (m + n))
        # each kind is drawn as its own matrix, with one over the root of its size as the bound
        ins, outs = drawn[: rank * n].view(2, n, half), drawn[rank * n :].view(2, m, half)
        return Adapter([Kernel(ins / (n * half) ** 0.5, outs / (m * half) ** 0.5, density)])

    return Recipe(build, rate=1e-3)
