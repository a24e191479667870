"""Blockwise reconstruction: everything in a compressed block is trained towards the original block's outputs.

    min over the block's parameters of  mean | block'(x^) - block(x) |^2

AdamW with weight decay 0.01, 10 % warm-up, cosine decay to a tenth, gradients clipped at 1: the settings of AA-SVD 2026
(local refinement).
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.hosts import Blockwise, Call

WARM_UP, FINAL_RATE, WEIGHT_DECAY, CLIP = 0.1, 0.1, 0.01, 1.0


def heal(
    runner: Blockwise,
    block: nn.Module,
    calls: Sequence[Call],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    fixed: Collection[nn.Parameter] = (),
    epochs: int,
    rate: float,
    seed: int,
    progress: Callable[[int], None],
    parameters: Sequence[nn.Parameter] | None = None,
) -> None:
    """Train a block in place.

    Args:
        runner: the model.
        block: the compressed block.
        calls: the block's call, per batch.
        inputs: its inputs in the compressed model, (b, t, d) per batch.
        targets: the original block's outputs, (b, t, d) per batch.
        fixed: parameters that other blocks share, which stay as they are.
        epochs: passes over all batches.
        rate: largest learning rate.
        seed: seed of the order of batches.
        progress: called with the number of epochs done.
        parameters: what is trained; None for all floating parameters of the block.
    """
    held = {id(p) for p in fixed}
    chosen = [p for p in parameters or block.parameters() if p.is_floating_point() and id(p) not in held]
    trained = [p.requires_grad_(True) for p in chosen]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY)
    steps = epochs * len(inputs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        progress(epoch)
        for i in torch.randperm(len(inputs), generator=generator).tolist():
            with torch.enable_grad():
                out = runner.run(block, inputs[i], calls[i])
                loss = F.mse_loss(out.float(), targets[i].float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: linear warm-up, then a cosine down to `FINAL_RATE`."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2
