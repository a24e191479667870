"""EVA: LoRA whose first factor spans the directions in which the inputs vary most, with ranks where they vary.

    W' = W + (alpha / r) B A,    A = the leading eigenvectors of Cov(x),   B = 0

The explained shares of all layers' components are pooled; the sum of r over layers of them is kept, at most rho r each.

Structure: low rank added. Start: W. Trained: A, B; sum of r_l (m_l + n_l) numbers. Data: moments of the inputs, of one
streaming pass, in place of the paper's incremental SVD of minibatches.

Source: Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", algorithm 1; rho = 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.linalg import leading_svd
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, added, check_rank


def eva(*, rank: int = 16, alpha: float = 16.0, rho: float = 2.0) -> Recipe:
    """LoRA started from the principal directions of the inputs, ranks redistributed by explained variance.

    Args:
        rank: r, on average over layers.
        alpha: the low-rank map is scaled by alpha / r.
        rho: most times r that one layer may get; 1 gives every layer r.
    """
    check_rank(rank)
    if rho < 1:
        raise EckartError(f"rho must be at least 1, got {rho}")
    most = int(rho * rank)

    def ranks(layers: Sequence[Layer]) -> dict[str, int]:
        """Return how many of the pooled components each layer holds; at least one each."""
        pool = [(float(s), layer.name) for layer in layers for s in _components(layer, most)[0][1:]]
        kept = sorted(pool, reverse=True)[: max(0, (rank - 1) * len(layers))]
        return {layer.name: 1 + sum(name == layer.name for _, name in kept) for layer in layers}

    def build(layer: Layer) -> Adapter:
        directions = _components(layer, most)[1][: layer.fitting(rank)]
        return Adapter([added(layer, rank, alpha / rank, down=directions.float())])

    return Recipe(build, rate=1e-3, uses_inputs=True, ranks=ranks)


def _components(layer: Layer, count: int) -> tuple[Tensor, Tensor]:
    """Return the explained shares (k,) and the directions (k, n) of the largest components of the inputs."""

    def find() -> tuple[Tensor, Tensor]:
        moments = layer.input_moments()
        mean = moments.mean.double()
        covariance = moments.second.double() - torch.outer(mean, mean)
        found = leading_svd([covariance], min(count, *layer.shape), seed=layer.seed)
        return found.values / covariance.diagonal().sum().clamp_min(1e-30), found.right

    shares, directions = layer.of_inputs(f"principal {min(count, *layer.shape)}", find)
    return shares, directions
