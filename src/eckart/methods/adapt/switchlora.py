"""SwitchLoRA: LoRA whose columns and rows are exchanged for others one by one, so that the sum of changes has any rank.

    W' = W + F + s B A,    s = alpha / r,    F = -s B0 A0 at the start

    switch of b_k for b:    F += s (b_k - b) a_k^T,   b_k <- b,   Adam forgets a_k, which then rests for `wait` steps
    switch of a_k for a:    F += s b_k (a_k - a)^T,   a_k <- a,   Adam forgets b_k, which then rests

so that no switch changes the function. After step t as many are due, of B and of A each, as make up r / interval_t per
step, interval_t = interval * 0.3^(-(t + 1) / (ratio * steps)); columns take turns, those of A half a turn behind. Each
side has min(m, n) vectors, r of them in use; what goes out waits among the others for its turn. Entries are uniform,
of deviation

    A: (r sqrt(m) / n^1.5)^(1/4) g^(1/2)        B: (r / sqrt(m n))^(1/4) g^(1/2)        g = 1 / sqrt(3)

The paper folds into W. Here W keeps its bytes, and F is a frozen low-rank change with a column for the start and for
every switch that there will be, or a dense one where that is smaller. As the number of steps is known, no more vectors
are drawn than have their turn. What the published code draws at random, the fractions of a switch per step, is added
up here, from a random share per layer. Its own AdamW counts steps by row; here the step of torch's is corrected
(optim/moments.py).

Moves between optimizer steps: trained without `adapters(model).follow(optimizer, steps)` it is LoRA from this start.

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Zhou et al. 2024, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information", and its published
code for the start and the turns. It trains from scratch at rates of about 1e-2; that of fine-tuning here is our choice.
"""

from typing import cast

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import LowRank
from eckart.methods.adapt.between import Behind, Between
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, moved_start
from eckart.methods.adapt.switching import Turns, extend

# What is left of the frequency of switches after ratio * steps.
LEFT = 0.3


def switchlora(
    *, rank: int = 128, alpha: float = 1.0, interval: float = 40.0, ratio: float = 0.1, wait: int = 5
) -> Recipe:
    """LoRA whose columns and rows are exchanged one by one, so that its changes add up to any rank.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
        interval: steps in which as many switches are made as there are columns, at first.
        ratio: share of all steps after which switches are 0.3 times as frequent.
        wait: steps that the counterpart of what was switched rests.
    """
    check_rank(rank)
    if wait < 0 or ratio <= 0 or interval < max(1, 2 * wait):
        raise EckartError(
            "interval must be at least 1 and twice wait, wait not negative and ratio positive, got "
            f"interval={interval}, wait={wait} and ratio={ratio}"
        )

    def build(layer: Layer) -> Adapter:
        r = layer.fitting(rank)
        return moved_start(LowRank(*_drawn(layer, r, r)), alpha / r)

    def turns(layer: Layer, r: int, index: int, steps: int) -> int:
        """Return how many switches of each side are made behind steps 0 to index."""
        shrink = LEFT ** (1 / (ratio * steps))
        due = r / interval * shrink * (1 - shrink ** (index + 1)) / (1 - shrink)
        share = float(torch.rand((), generator=layer.generator(), dtype=torch.float64))
        return int(due + share)

    def prepare(layer: Layer, adapter: Adapter, steps: int) -> None:
        r = _factors(adapter)[0].shape[1]
        count = turns(layer, r, steps - 1, steps) if r < min(layer.shape) else 0
        spare = min(min(layer.shape) - r, count)
        fold = cast(Plus, adapter.chain()[0])
        first = extend(fold, 2 * count)
        adapter.fix(fold)
        drawn = _drawn(Layer(f"{layer.name} spare", layer.module, layer.seed), r, spare)
        cast(Plus, adapter.chain()[1]).rule = Turns(r, drawn, first, wait)

    def behind(layer: Layer, adapter: Adapter, at: Behind) -> None:
        fold, (up, down) = cast(Plus, adapter.chain()[0]), _factors(adapter)
        own, r = cast(Turns, cast(Plus, adapter.chain()[1]).rule), up.shape[1]
        own.rest(up, down, at.optimizer)
        if len(own.spare_up):
            for turn in range(turns(layer, r, at.index - 1, at.steps), turns(layer, r, at.index, at.steps)):
                own.take(turn, fold, up, down, at.optimizer)

    return Recipe(build, rate=2e-3, between=Between(prepare, behind))


def _drawn(layer: Layer, rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Return that many columns of B and rows of A, (m, count) and (count, n)."""
    m, n = layer.shape
    drawn = layer.uniform(count * (m + n))
    of_up, of_down = 3**0.25 * (rank / (m * n) ** 0.5) ** 0.25, 3**0.25 * (rank * m**0.5 / n**1.5) ** 0.25
    return drawn[: count * m].view(m, count) * of_up, drawn[count * m :].view(count, n) * of_down


def _factors(adapter: Adapter) -> tuple[nn.Parameter, nn.Parameter]:
    delta = cast(Plus, adapter.chain()[1]).delta
    return delta.get_parameter("up.weight"), delta.get_parameter("down.weight")
