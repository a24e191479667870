"""Plans, outcomes, contents, methods and evaluations as tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from eckart.methods.compress.outcome import Checked, LayerPlan, Measured, Outcome, Plan
from eckart.report.units import count, duration, loss, share, size

if TYPE_CHECKING:  # they import transformers, which the tables do without
    from eckart.files.inspect import Contents, LayerContents
    from eckart.methods.evaluation import Evaluation

# Above this many layers, those whose names differ only in numbers share a row.
MOST_ROWS = 24
# What a folder says of its making that its table shows otherwise, or not at all.
UNSAID = ("parameters_before", "parameters_after", "bytes_before", "bytes_after", "model_hash")

# The unit of errors that are shares of a layer's own output: unlike losses they do not add up.
RELATIVE = "relative squared error"

Layers: TypeAlias = "Sequence[LayerPlan] | Sequence[LayerContents]"


def plan_table(plan: Plan, every_layer: bool = False) -> RenderableType:
    """Return what every layer becomes, and what that adds up to.

    Args:
        plan: the plan.
        every_layer: one row per layer, however many there are.
    """
    lines = [
        f"{plan.method} at {_asked(plan)}: {share(plan.kept)} of {plan.parameters_before:,} parameters remain, "
        f"{plan.parameters_after:,}; {size(plan.bytes_before)} become {size(plan.bytes_after)}"
    ]
    lines += _spent(plan)
    if plan.sizes:
        lines.append(_every_size(plan.sizes[0].keep, plan.sizes[-1].keep, plan.components))
    if plan.unit != RELATIVE:
        lines.append(f"predicted increase of the loss: {loss(plan.loss)} {plan.unit}, the sum over the layers")
    sizes = [_sizes_table(plan)] if plan.sizes else []
    return _stack(_layer_table(plan.layers, every_layer, plan.unit), *sizes, Text("\n".join([*lines, *_legend(plan)])))


def _every_size(least: float, largest: float, components: int) -> str:
    return f"elastic: every size from keep {least:g} to {largest:g}; components take {size(components)} more"


def _sizes_table(plan: Plan) -> Table:
    """Return the sizes of an elastic folder; what its layers are at the largest is the other table."""
    table = _table("keep", "parameters", "bytes", "predicted")
    for at in plan.sizes:
        table.add_row(f"{at.keep:.3g}", f"{at.parameters:,}", size(at.nbytes), loss(at.loss))
    return table


def _asked(plan: Plan) -> str:
    return plan.spent.limit if plan.spent is not None else f"keep {plan.keep:g}"


def _spent(plan: Plan) -> list[str]:
    """Return what operations or time become, where the budget is over them."""
    if plan.spent is None or plan.spent.unit == "bytes":
        return []
    spent, measured = plan.spent, ", as measured here" if plan.spent.unit == "microseconds" else ""
    change = f"{count(spent.before)} {spent.unit} become {count(spent.after)}"
    return [f"linear layers and head, one token{measured}: {change}, {spent.after / spent.before:.3f} x"]


def _legend(plan: Plan) -> list[str]:
    if not any(layer.loss for layer in plan.layers):
        return []
    return [f"error: {plan.unit}, the mean of a row"] if plan.unit == RELATIVE else [f"loss: predicted, {plan.unit}"]


def outcome_table(outcome: Outcome, every_layer: bool = False) -> RenderableType:
    """Return what every layer became, and the model before and after."""
    plan, table = outcome.plan, _table("", "before", "after", "change")
    rows: list[tuple[str, str, str, float]] = [
        ("parameters", f"{plan.parameters_before:,}", f"{plan.parameters_after:,}", plan.kept),
        ("bytes", size(plan.bytes_before), size(plan.bytes_after), plan.bytes_after / plan.bytes_before),
    ]
    for label, before, after, ratio in rows:
        table.add_row(label, before, after, f"{100 * (ratio - 1):+.1f} %")
    notes = _legend(plan) + _spent(plan)
    if outcome.measured is not None:
        table.add_row(*_measured_row(outcome.measured))
        notes.append(_measured_on(outcome.measured))
    if outcome.checked is not None:
        notes.append(_checked(outcome.checked))
    notes.append(f"{duration(outcome.seconds)}, {size(outcome.peak_memory)} of memory at most")
    notes.append(f"written to {outcome.out}")
    return _stack(_layer_table(plan.layers, every_layer, plan.unit), table, Text("\n".join(notes)))


def _checked(checked: Checked) -> str:
    speeds = "".join(
        f"; {task} {count(s.compressed)} tokens/s, {s.compressed / s.dense:.2f} x the dense model's"
        for task, s in checked.speeds.items()
    )
    agree = f"{checked.what} agree to {checked.difference:.0e}"
    return f"checked: a fresh process loads it, {agree}, {size(checked.nbytes)}{speeds}"


def _measured_row(measured: Measured) -> tuple[str, str, str, str]:
    label = "loss, nats per token" if measured.name == "loss" else measured.name
    return label, f"{measured.before:.4f}", f"{measured.after:.4f}", f"{measured.after - measured.before:+.4f}"


def _measured_on(measured: Measured) -> str:
    seen = "tokens that the fits did not see" if measured.held_out else "tokens of the calibration text"
    return f"{measured.name} measured on {measured.tokens:,} {seen}"


def contents_table(contents: "Contents", every_layer: bool = False) -> RenderableType:
    """Return what a folder holds, how it was made, and what was measured then."""
    parts: list[RenderableType] = [_layer_table(contents.layers, every_layer)] if contents.layers else []
    made_by = dict(contents.made_by)
    measured = made_by.pop("measured", None)
    text = f"{contents.architecture}: {contents.parameters:,} parameters, {size(contents.nbytes)}"
    if contents.layers:
        text += f"; {share(contents.kept)} of the dense model's {contents.dense_parameters:,}"
    else:
        text += "; no compressed layers"
    lines = [text]
    if contents.elastic is not None:
        least, largest, nbytes = (contents.elastic[key] for key in ("least", "largest", "nbytes"))
        lines.append(_every_size(least, largest, nbytes))
    if isinstance(measured, Mapping):
        lines.append(f"{measured['name']} {measured['before']:.4f} before, {measured['after']:.4f} after")
    if made_by:
        lines.append("made by " + ", ".join(f"{key} {value}" for key, value in _flat(made_by)))
    return _stack(*parts, Text("\n".join(lines)))


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _flat(value)
        elif value is not None and key not in UNSAID:
            out.append((key, value))
    return out


def _layer_table(layers: Layers, every_layer: bool, unit: str = "") -> Table:
    """Return a table of layers: name, structure, rank, numbers, share kept, bytes, and loss or error if predicted."""
    predicted = any(getattr(layer, "loss", 0.0) for layer in layers)
    groups: dict[tuple[str, str], list[LayerPlan | LayerContents]] = {}
    grouped = len(layers) > MOST_ROWS and not every_layer
    for layer in layers:
        groups.setdefault((pattern(layer.name) if grouped else layer.name, layer.structure), []).append(layer)
    patterns = list(dict.fromkeys(name for name, _ in groups))
    table = _table("layer", *(["layers"] if grouped else []), "structure", "rank", "numbers", "kept", "bytes")
    if predicted:
        table.add_column("error" if unit == RELATIVE else "loss", justify="right", no_wrap=True)
    for (name, structure), members in sorted(groups.items(), key=lambda item: patterns.index(item[0][0])):
        numbers, dense = (sum(getattr(m, key) for m in members) for key in ("numbers", "dense_numbers"))
        row: list[RenderableType] = [
            _Dotted(name),
            *([str(len(members))] if grouped else []),
            structure,
            _ranks(structure, members),
            count(numbers),
        ]
        row += [share(numbers / dense), size(sum(m.nbytes for m in members))]
        if predicted:
            total = sum(getattr(m, "loss", 0.0) for m in members)
            row.append(loss(total / len(members) if unit == RELATIVE else total))
        table.add_row(*row)
    return table


def pattern(name: str) -> str:
    """Return a name with its numbers as stars."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _ranks(structure: str, members: "Sequence[LayerPlan | LayerContents]") -> str:
    if structure == "dense":
        return "full"
    low, high = min(m.rank for m in members), max(m.rank for m in members)
    return str(low) if low == high else f"{low}-{high}"


class _Dotted:
    """A dotted name that breaks behind its dots where a terminal has no room for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(len(part) for part in self.name.split(".")) + 1, len(self.name))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for part in self.name.replace(".", ". ").split(" "):
            if lines[-1] and len(lines[-1]) + len(part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), overflow="fold")


def evaluation_table(evaluation: "Evaluation") -> Table:
    """Return what was measured of a model."""
    table = _table("measured", "")
    if evaluation.nats_per_token is not None:
        table.add_row("loss, nats per token", f"{evaluation.nats_per_token:.4f}")
        table.add_row("perplexity", f"{evaluation.perplexity:.4f}")
        table.add_row("bits per byte", f"{evaluation.bits_per_byte:.4f}")
        table.add_row("tokens scored", f"{evaluation.tokens:,}")
    if evaluation.spearman is not None:
        table.add_row("Spearman correlation", f"{evaluation.spearman:.4f}")
        table.add_row("pairs", f"{evaluation.pairs:,}")
        table.add_row("tokens read", f"{evaluation.tokens:,}")
    if evaluation.accuracy is not None:
        table.add_row("accuracy", f"{evaluation.accuracy:.4f}")
        table.add_row("loss, nats per sentence", f"{evaluation.nats_per_example:.4f}")
        table.add_row("expected calibration error", f"{evaluation.calibration_error:.4f}")
        table.add_row("sentences", f"{evaluation.examples:,}")
        table.add_row("tokens read", f"{evaluation.tokens:,}")
    table.add_row("tokens per second", count(evaluation.tokens_per_second))
    table.add_row("time", duration(evaluation.seconds))
    return table


def comparison_table(rows: "Sequence[tuple[str, int, int, Evaluation]]") -> Table:
    """Return models beside each other: (name, parameters, bytes, evaluation), the first the one to compare with."""
    table = _table("", "parameters", "bytes", "loss", "perplexity", "tokens/s")
    for name, parameters, nbytes, found in rows:
        perplexity = "" if found.perplexity is None else f"{found.perplexity:.3f}"
        nats = "" if found.nats_per_token is None else f"{found.nats_per_token:.4f}"
        table.add_row(name, f"{parameters:,}", size(nbytes), nats, perplexity, count(found.tokens_per_second))
    return table


def _stack(*parts: RenderableType) -> RenderableType:
    """Put parts below each other with an empty line between."""
    out: list[RenderableType] = []
    for part in parts:
        out += [*([Text()] if out else []), part]
    return Group(*out)


def _table(first: str, *others: str) -> Table:
    """Return an empty table: the first column folds where there is no room, the others are right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "structure" else "right", no_wrap=True)
    return table
