"""A difference between two models as a table."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eckart.files.delta import Difference, StoredTensor
from eckart.methods.delta.outcome import Delta, TensorDelta
from eckart.report.tables import MOST_ROWS, pattern
from eckart.report.units import share, size


def delta_table(made: Delta, every_tensor: bool = False) -> RenderableType:
    """Return what is stored of every tensor, and what that adds up to.

    Args:
        made: what `delta` wrote.
        every_tensor: one row per tensor, however many there are.
    """
    grouped = len(made.tensors) > MOST_ROWS and not every_tensor
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("tensor", overflow="fold")
    table.add_column("tensors" if grouped else "structure", justify="right" if grouped else "left", no_wrap=True)
    for name in ("bytes", "error left"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = dict[str, list[TensorDelta]]()
    for tensor in made.tensors:
        rows.setdefault(pattern(tensor.name) if grouped else tensor.name, []).append(tensor)
    for name, members in rows.items():
        what = str(len(members)) if grouped else members[0].structure
        left = _left(sum(t.before for t in members), sum(t.after for t in members))
        table.add_row(name, what, size(sum(t.nbytes for t in members)), left)
    notes = [
        f"{size(made.tuned_bytes)} become {size(made.nbytes)}, {share(made.share)}, beside the base",
        f"error: {made.unit}; {made.before:.4g} with the base alone, {made.after:.4g} as stored",
        f"written to {made.out}",
    ]
    return Group(table, Text(), Text("\n".join(notes)))


def difference_table(found: Difference, every_tensor: bool = False) -> RenderableType:
    """Return what a stored difference holds, and what it was made from.

    Args:
        found: the contents.
        every_tensor: one row per tensor, however many there are.
    """
    grouped = len(found.tensors) > MOST_ROWS and not every_tensor
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("tensor", *(["tensors"] if grouped else []), "structure", "rank", "bytes"):
        table.add_column(name, overflow="fold", justify="left" if name in ("tensor", "structure") else "right")
    rows = dict[tuple[str, str], list[StoredTensor]]()
    for tensor in found.tensors:
        rows.setdefault((pattern(tensor.name) if grouped else tensor.name, tensor.structure), []).append(tensor)
    order = list(dict.fromkeys(name for name, _ in rows))
    for (name, structure), members in sorted(rows.items(), key=lambda item: order.index(item[0][0])):
        ranks = sorted({tensor.rank for tensor in members})
        rank = "-" if not ranks[-1] else "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
        counted = [str(len(members))] if grouped else []
        table.add_row(name, *counted, structure, rank, size(sum(tensor.nbytes for tensor in members)))
    made_by = ", ".join(f"{key} {value}" for key, value in found.made_by.items() if value is not None)
    notes = [f"a difference from {found.base} ({found.base_sha256[:12]}), {size(found.nbytes)}", f"made by {made_by}"]
    return Group(table, Text(), Text("\n".join(notes)))


def _left(before: float, after: float) -> str:
    return share(after / before) if before > 0 else "-"
