"""Finding the learning rate by a short sweep, or from the curvature: it matters more than the method.

From one start, every rate of a geometric grid around the method's own trains for a few steps; the rate whose held-out
loss is then lowest is taken. A rate that diverges is out. The same seed gives the same order of examples to all.

Source: the grid as in "LoRAFactory: A Unified Study of LoRA Variants", which tunes the rate of every method.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts import AdaptedHost, Adapter
from eckart.methods.adapt.curvature import BATCHES, SHARE_OF_EDGE, WARM, edge_rate
from eckart.methods.training import Course, DivergedError, Follow, Step, StepLoss, train
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
    follow: Follow,
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
        follow: has each run's optimizer followed by methods that move between steps.
        seed: seed of order and draws.
        grid: multiples of the rate.
        progress: told of the stage "rates".

    Raises:
        EckartError: if every rate diverges.
    """
    found: dict[float, float] = {}
    for i, factor in enumerate(grid):
        progress("rates", i, len(grid))
        each = replace(course, rate=course.rate * factor)
        with _as_before(model):
            try:
                _short_run(model, rows, each, loss, share, seed, follow)
                found[each.rate] = measure()
            except DivergedError:
                found[each.rate] = float("inf")
    progress("rates", len(grid), len(grid))
    if min(found.values()) == float("inf"):
        tried = ", ".join(f"{rate:g}" for rate in found)
        raise EckartError(f"the run diverges at every rate tried ({tried}); give a smaller one")
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def curvature_rate(
    model: nn.Module,
    rows: Tensor,
    course: Course,
    loss: StepLoss,
    *,
    share: Callable[[str], float],
    seed: int,
    progress: Progress,
) -> float:
    """Return the rate that the curvature allows behind a few steps; the model is as it was then.

    Args:
        model: what trains, its trained parameters requiring gradients.
        rows: examples, (count, ...).
        course: how the run goes; its rate is that of the few steps.
        loss: of a step.
        share: of the rate that a parameter of that name has.
        seed: seed of order and draws.
        progress: told of the stage "curvature".

    Raises:
        EckartError: if no gradient reaches what trains, or the loss is nowhere convex.
    """
    progress("curvature", 0, 1)
    few = replace(course, steps=WARM, final=1.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
    batches = rows[order[: BATCHES * course.batch]].split(course.batch)

    def of_batch(batch: Tensor) -> Tensor:
        return loss(Step(0, batch, torch.Generator().manual_seed(seed), course.rate))[0]

    with _as_before(model):
        _short_run(model, rows, few, loss, share, seed, lambda optimizer: ())  # nothing has moved yet
        training = model.training
        model.eval()
        edge = edge_rate(model, batches, of_batch, rate=course.rate, share=share, seed=seed)
        model.train(training)
    progress("curvature", 1, 1)
    return SHARE_OF_EDGE * edge


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Put what trains, and the buffers, back to where they are now; of adapters, which may move, copies train."""
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [(tensor, tensor.detach().clone()) for tensor in (*trained, *model.buffers())]
    layers = [module for module in model.modules() if isinstance(module, AdaptedHost)]
    kept = [layer.adapters for layer in layers]
    # what chooses channels is shared by layers and known to the model's hooks: no copies of it
    held = [adapter for each in kept for adapter in cast(Iterable[Adapter], each.values())]
    shared: dict[int, Any] = {id(adapter.shortcut): adapter.shortcut for adapter in held}
    for layer, copied in zip(layers, copy.deepcopy(kept, shared), strict=True):
        layer.adapters = copied
    try:
        yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            layer.adapters = own
        with torch.no_grad():
            for tensor, value in start:
                tensor.copy_(value)


def _short_run(
    model: nn.Module,
    rows: Tensor,
    course: Course,
    loss: StepLoss,
    share: Callable[[str], float],
    seed: int,
    follow: Follow,
) -> None:
    """Train for a while, its state kept nowhere."""
    with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
        state = Path(scratch) / "state.safetensors"
        train(model, rows, course, loss, state=state, seed=seed, follow=follow, share=share, progress=_silent)


def _silent(stage: str, done: int, total: int) -> None:
    """Say nothing of the short runs themselves."""
