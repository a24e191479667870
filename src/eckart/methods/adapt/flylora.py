"""FlyLoRA: a frozen sparse random projection, of which every token uses its largest outputs.

    W' x = W x + (alpha / r) B h_K,    h = A x,   K the k largest |h + d|,   d_i += u sign(mean count - count_i)

Every row of A has k n / r numbers of N(0, 1 / r^2), drawn from the seed. The choice is not linear in x, so the adapter
is never merged; hosts/routed.py has it and the bias d.

Structure: routed low rank added. Start: W. Trained: B = 0 at the start; m r numbers.

Source: Zou et al. 2025, "FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-
Experts"; r = 32, k = 8, alpha = 2 r, u = 1e-3. One version of the published file subtracts counts from expected
fractions, so that its bias can only fall; counts are compared with counts here.
"""

import torch

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.routed import Routed
from eckart.maps import sparse_of
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def flylora(*, rank: int = 32, kept: int = 8, alpha: float = 64.0, balance: float = 1e-3) -> Recipe:
    """A frozen sparse random projection, of which every token uses its largest outputs.

    Args:
        rank: r.
        kept: k, outputs that each token uses.
        alpha: the change is scaled by alpha / r.
        balance: u, step of the bias that evens out how often each output is used.
    """
    check_rank(rank)
    if not 0 < kept <= rank or balance < 0:
        raise EckartError(f"kept must be 1 to rank and balance not negative, got {kept} of {rank} and {balance}")

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        count, random = max(1, kept * n // rank), layer.generator()
        columns = torch.cat([torch.randperm(n, generator=random)[:count].sort().values for _ in range(rank)])
        values = torch.randn(rank * count, generator=random) / rank
        down = sparse_of(torch.arange(rank).repeat_interleave(count), columns, values, (rank, n)).to(
            device=layer.device
        )
        return Adapter([Routed(torch.zeros(m, rank, device=layer.device), down, kept, alpha / rank, balance)])

    return Recipe(build, rate=1e-3)
