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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.entrywise import Entrywise
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
        return Adapter([_Kernel(ins / (n * half) ** 0.5, outs / (m * half) ** 0.5, density)])

    return Recipe(build, rate=1e-3)


class _Kernel(Entrywise):
    """W + the large entries of a kernel matrix."""

    def __init__(self, inputs: Tensor, outputs: Tensor, density: float) -> None:
        super().__init__((outputs.shape[1], inputs.shape[1]))
        self.inputs, self.outputs, self.density = nn.Parameter(inputs), nn.Parameter(outputs), density

    def made_of(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            sizes = _kernel(self.inputs, self.outputs).abs().flatten()
            dropped = sizes.numel() - max(1, round(self.density * sizes.numel()))
            least = sizes.kthvalue(dropped + 1).values
        return self.inputs, self.outputs, least

    def rows(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        inputs, outputs, least = own
        kernel = _kernel(inputs, outputs[:, start:stop])
        size = kernel.detach().abs()
        return kernel * size.where(size >= least, 0.0)


def _kernel(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return K (m, n) of vectors (2, n, r / 2) of the inputs and (2, m, r / 2) of the outputs."""
    distances = torch.cdist(outputs, inputs, compute_mode="donot_use_mm_for_euclid_dist")
    return 0.1 * (distances[0] - distances[1])
