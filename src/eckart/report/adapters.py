"""What a fine-tune did, and what folding adapters lost, as tables."""

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eckart.methods.adapt.folding import Folded
from eckart.methods.adapt.tune import Tuned
from eckart.report.units import duration, share, size

# Layers shown unless all are asked for, and the share of a change that is rounding.
SHOWN, EXACT = 5, 1e-4


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


def folded_table(done: Folded, every_layer: bool = False) -> RenderableType:
    """Return what of the adapters' change the layers' structures cannot hold, and where the model was written."""
    losing = {name: lost for name, lost in done.lost.items() if lost > EXACT}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("share of its change lost", justify="right", no_wrap=True)
    worst = sorted(losing.items(), key=lambda item: -item[1])
    for name, lost in done.lost.items() if every_layer else worst[:SHOWN]:
        table.add_row(name, share(lost))
    more = "" if every_layer or len(losing) <= SHOWN else f"; {len(losing) - SHOWN} more with --every-layer"
    kept = f"{len(done.lost) - len(losing)} of {len(done.lost)} layers hold all of the change{more}"
    notes = [f"{', '.join(done.adapters)}: {kept}", f"written to {done.out}, {size(done.nbytes)}"]
    text = Text("\n".join(notes))
    return Group(table, Text(), text) if every_layer or losing else text


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
