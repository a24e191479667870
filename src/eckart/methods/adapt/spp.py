"""SPP: every weight is rescaled a little, so that zeros stay zeros.

    W'_ij = W_ij (1 + s b_i a_p(i)j),    p(i) = floor(i r / m): r groups of rows, each with a vector a of its own

The product with W is written out a block of rows at a time and never kept (hosts/entrywise.py).

Structure: entrywise product. Start: W. Trained: a (r, n) uniform in +-1/sqrt(n), b (m) = 0; r n + m numbers.

Source: Lu et al. 2024, "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models", and its
published code for the groups, the start and s = alpha / r; r = 16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eckart.hosts import Adapter
from eckart.hosts.entrywise import Entrywise
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def spp(*, rank: int = 16, alpha: float = 16.0) -> Recipe:
    """Every weight rescaled, so that zeros stay zeros.

    Args:
        rank: r, groups of rows.
        alpha: the change is scaled by alpha / r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        groups = layer.uniform(min(rank, m), n) / n**0.5
        return Adapter([_Rescaled(groups, torch.zeros(m, device=layer.device), alpha / rank)])

    return Recipe(build, rate=1e-3)


class _Rescaled(Entrywise):
    """W + s W * (b_i a_p(i)j)."""

    reads_weight = True

    def __init__(self, columns: Tensor, rows: Tensor, scale: float) -> None:
        super().__init__((rows.shape[0], columns.shape[1]), scale)
        self.of_columns, self.of_rows = nn.Parameter(columns), nn.Parameter(rows)

    def made_of(self) -> tuple[Tensor, ...]:
        return self.of_columns, self.of_rows

    def rows(self, start: int, stop: int, own: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        of_columns, of_rows = own
        group = torch.arange(start, stop, device=of_rows.device) * of_columns.shape[0] // self.shape[0]
        product: Tensor = of_columns[group] * of_rows[start:stop, None]
        return product if weight is None else product * weight
