"""How long work tells how far it is."""

from collections.abc import Callable

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


def later(progress: Progress, start: int, total: int) -> Progress:
    """Return a progress for one of several runs that are one stage: their steps begin at `start`, of `total` in all."""
    return lambda stage, done, _: progress(stage, start + done, total)
