"""What a fine-tune did as a table."""

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eckart.methods.adapt.tune import Tuned
from eckart.report.units import duration, share


def tuned_table(done: Tuned) -> RenderableType:
    """Return what was measured on held-out examples before and after, and what trained."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("held out", no_wrap=True)
    for heading in ("before", "after"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, value in done.before.items():
        table.add_row(name, f"{value:.4f}", f"{done.after[name]:.4f}")
    probed = f"{_steps(done.probe)} of the head alone, then " if done.probe else ""
    part = share(done.trained / done.parameters)
    notes = [
        *_calibration(done.calibration),
        f"{done.method}: {done.trained:,} of {done.parameters:,} parameters trained ({part})",
        f"{probed}{_steps(done.steps)} at rate {done.rate:g}, {duration(done.seconds)}",
        f"written to {done.out}",
    ]
    return Group(table, Text(), Text("\n".join(notes)))


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _calibration(found: Mapping[str, float]) -> list[str]:
    """Return a line on how far a classifier's confidence is from how often it is right."""
    if not found:
        return []
    return [
        f"expected calibration error {found['error']:.3f}, and {found['scaled']:.3f} where logits are divided by "
        f"{found['temperature']:.3g}"
    ]
