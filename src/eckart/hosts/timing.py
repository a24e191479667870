"""Timing that survives a busy machine: everything to be compared takes turns, and medians are compared."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

LEAST_ROUNDS, MOST_ROUNDS = 3, 15


def medians(tasks: Mapping[str, Callable[[], object]], *, seconds: float = 1.0) -> dict[str, float]:
    """Return the median seconds of each task over rounds in which all of them take turns.

    Args:
        tasks: what to time, by name; each is run once before, to warm up.
        seconds: about how long to go on; at least `LEAST_ROUNDS` rounds whatever they take, at most `MOST_ROUNDS`.
    """
    for task in tasks.values():
        _timed(task)
    taken: dict[str, list[float]] = {name: [_timed(task)] for name, task in tasks.items()}
    rounds = int(seconds / max(sum(first for (first,) in taken.values()), 1e-9))
    for _ in range(min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS) - 1):
        for name, task in tasks.items():
            taken[name].append(_timed(task))
    return {name: statistics.median(several) for name, several in taken.items()}


def _timed(task: Callable[[], object]) -> float:
    started = time.perf_counter()
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
