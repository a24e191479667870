"""Finding the learning rate by a short sweep: it matters more than the method.

From one start, every rate of a geometric grid around the method's own trains for a few steps; the rate whose held-out
loss is then lowest is taken. A rate that diverges is out. The same seed gives the same order of examples to all.

Source: the grid as in "LoRAFactory: A Unified Study of LoRA Variants", which tunes the rate of every method.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.methods.training import Course, DivergedError, StepLoss, train
from eckart.progress import Progress

# Times the method's own rate.
GRID = (0.1, 0.3, 1.0, 3.0, 10.0)


def find_rate(
    model: nn.Module,
    rows: Tensor,
    course: Course,
    loss: StepLoss,
    measure: Callable[[], float],
    *,
    share: Callable[[str], float],
    seed: int,
    grid: Sequence[float],
    progress: Progress,
) -> dict[float, float]:
    """Return the held-out loss after a short run at each rate, the best first; the model is as it was then.

    Args:
        model: what trains, its trained parameters requiring gradients.
        rows: examples, (count, ...).
        course: how each run goes; its rate is what the grid multiplies.
        loss: of a step.
        measure: returns the held-out loss of the model as it is.
        share: of the rate that a parameter of that name has.
        seed: seed of order and draws.
        grid: multiples of the rate.
        progress: told of the stage "rates".

    Raises:
        EckartError: if every rate diverges.
    """
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    found: dict[float, float] = {}
    for i, factor in enumerate(grid):
        progress("rates", i, len(grid))
        each = replace(course, rate=course.rate * factor)
        with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
            state = Path(scratch) / "state.safetensors"
            try:
                train(model, rows, each, loss, state=state, seed=seed, share=share, progress=_silent)
                found[each.rate] = measure()
            except DivergedError:
                found[each.rate] = float("inf")
        with torch.no_grad():
            for name, value in start.items():
                model.get_parameter(name).copy_(value)
            for name, value in buffers.items():
                model.get_buffer(name).copy_(value)
    progress("rates", len(grid), len(grid))
    if min(found.values()) == float("inf"):
        tried = ", ".join(f"{rate:g}" for rate in found)
        raise EckartError(f"the run diverges at every rate tried ({tried}); give a smaller one")
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _silent(stage: str, done: int, total: int) -> None:
    """Say nothing of the short runs themselves."""
