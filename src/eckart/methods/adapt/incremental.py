"""Incremental rank updates: every task adds a few rank-one terms, and weighs those of all earlier tasks anew.

    W_t = W + sum_{s <= t} U_s diag(s_{t,s}) V_s

The first task has r_1 terms, a later one r_2. Those of earlier tasks never change again (`adapt(..., after=)` freezes
them), so every task computes the same bits after all that follow. They are shared in memory; a saved task is whole.

Structure: sum of U diag(s) V, those of earlier tasks with frozen U and V. Start: W; U and V random with orthonormal
columns and rows, all selectors 0. The published networks have no W below, and start the task's own selectors at 1
(`selector`). Trained: U_t, V_t and all s_t; r (m + n) numbers and one per term.

Source: Hyder, Shao, Hou, Markopoulos, Prater-Bennette and Asif 2022, "Incremental Task Learning with Incremental Rank
Updates", and its published code: r_1 = 11, r_2 = 1.
"""

from typing import cast

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.hosts import Adapter, map_of
from eckart.hosts.adapter import Plus
from eckart.linalg import polar_factor
from eckart.maps import Dense, Diagonal, Product
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, train_only


def incremental(*, rank: int = 11, later: int = 1, selector: float = 0.0) -> Recipe:
    """Every task adds a few rank-one terms, and weighs those of all earlier tasks anew.

    Args:
        rank: r_1, terms of the first task.
        later: r_2, terms of each later one.
        selector: where the selectors of a task's own terms start.
    """
    check_rank(rank)
    if later < 1:
        raise EckartError(f"later must be at least 1, got {later}")

    def build(layer: Layer) -> Adapter:
        earlier = [] if layer.earlier is None else _terms(layer.earlier)
        before, own = sum(up.shape[1] for up, _ in earlier), layer.fitting(later if earlier else rank)
        m, n = layer.shape
        random = layer.generator()
        drawn = torch.randn(before + own, m + n, generator=random)[before:].to(layer.device)  # none drawn twice
        up, down = (polar_factor(part) for part in drawn.split((m, n), dim=1))
        new = Plus(_selected(up.mT.contiguous(), down, selector))
        return Adapter([*(train_only(Plus(_selected(u, v, 0.0)), "delta.1.") for u, v in earlier), new])

    # Selectors have to grow from 0, unit vectors only have to turn.
    return Recipe(build, rate=1e-2, shares={".delta.0.": 0.1, ".delta.2.": 0.1}, follows=True)


def _selected(up: Tensor, down: Tensor, selector: float) -> Product:
    """Return U diag(s) V with constant s."""
    return Product((Dense(up), Diagonal(torch.full((down.shape[0],), selector, device=down.device)), Dense(down)))


def _terms(adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
    """Return U and V of every task up to an adapter's, sharing its memory."""
    found = [cast(Product, map_of(cast(Plus, change).delta)).maps for change in adapter.chain()]
    return [(cast(Dense, up).weight.detach(), cast(Dense, down).weight.detach()) for up, _, down in found]
