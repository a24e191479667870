"""How long work tells how far it is."""

from collections.abc import Callable

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""
