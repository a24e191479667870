"""The commands of adapters. What is imported inside them would make `eckart --help` take seconds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.guard import CONTINUES, STARTS_AGAIN, guarded, print_json
from eckart.cli.options import EveryLayer, Json, require_model
from eckart.errors import EckartError


@guarded(CONTINUES)
def adapt(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model, dense or compressed.")],
    data: Annotated[Path, typer.Option(help="Text or .jsonl to learn, or labelled rows in .jsonl or .tsv.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not hold anything yet.")],
    method: Annotated[str, typer.Option(help="Name of a method; `eckart adapters` lists them.")] = "lora",
    rank: Annotated[int | None, typer.Option(help="The same as --set rank=...")] = None,
    after: Annotated[
        Path | None, typer.Option(help="Adapter of an earlier task to build on, with --method incremental.")
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="What to measure on.  [default: a tenth of the data]")] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of the text.")] = "text",
    label_field: Annotated[
        str | None, typer.Option(help="Field or column of the label, which makes it a classification.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a window of text, and the most of a sentence.")] = 256,
    rate: Annotated[
        str | None, typer.Option(help="Learning rate; auto (by a sweep) or curvature.  [default: the method's]")
    ] = None,
    probe: Annotated[int, typer.Option(help="Steps in which the head of a classification trains alone before.")] = 0,
    probe_rate: Annotated[float, typer.Option(help="Learning rate of these steps.")] = 1e-3,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="Layer to adapt, as its name ends.  [default: all in blocks]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    file_format: Annotated[str, typer.Option("--format", help="Of the adapter's files: eckart or peft.")] = "eckart",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model with an adapter: a small trained map beside every frozen one, measured before and after."""
    require_model(model)
    for given in (data, *((validation,) if validation else ())):
        if not given.is_file():
            raise EckartError(f"there is no file {given}")
    if file_format not in ("eckart", "peft"):
        raise EckartError(f"--format must be eckart or peft, got {file_format!r}")

    from eckart.cli.progress import Bars
    from eckart.cli.settings import parse_adapter_settings
    from eckart.methods.adapt.tune import tune
    from eckart.report.adapters import tuned_table
    from eckart.report.console import print_all

    assignments = [*(settings or []), *([] if rank is None else [f"rank={rank}"])]
    typed = parse_adapter_settings(method, assignments)
    with Bars() as progress:
        done = tune(
            model, data, out, method=method, after=after, validation=validation, text_field=text_field,
            label_field=label_field, steps=steps, batch=batch, length=length, rate=_rate(rate), probe=probe,
            probe_rate=probe_rate, targets=targets or None, seed=seed, settings=typed, progress=progress,
            format="peft" if file_format == "peft" else "eckart",
        )  # fmt: skip
    print_json(done.as_dict()) if as_json else print_all(tuned_table(done))


@guarded(STARTS_AGAIN)
def fold(
    model: Annotated[Path, typer.Argument(help="Folder of the base model, dense or compressed.")],
    adapter: Annotated[list[Path], typer.Argument(help="Folders of saved adapters, composed in this order.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not hold anything yet.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text on which merged layers are to be near.  [default: near in their weights]")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of that text.")] = "text",
    length: Annotated[int, typer.Option(help="Tokens of a window of that text.")] = 256,
    every_layer: EveryLayer = False,
    as_json: Json = False,
) -> None:
    """Write a model with saved adapters merged into it, which loads without them."""
    require_model(model)
    if calibration is not None and not calibration.is_file():
        raise EckartError(f"there is no file {calibration}")

    from eckart.cli.progress import Bars
    from eckart.methods.adapt.folding import fold_adapters
    from eckart.report.adapters import folded_table
    from eckart.report.console import print_all

    with Bars() as progress:
        done = fold_adapters(
            model, adapter, out, calibration=calibration, text_field=text_field, length=length, progress=progress
        )
    print_json(done.as_dict()) if as_json else print_all(folded_table(done, every_layer))


def _rate(given: str | None) -> Any:
    """Return a learning rate as `tune` takes it."""
    if given in (None, "auto", "curvature"):
        return given
    try:
        return float(given)
    except ValueError:
        raise EckartError(f"--rate must be a number, auto or curvature, got {given!r}") from None


@guarded(STARTS_AGAIN)
def adapters(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods of adaptation, or print one method's formula, source and settings."""
    from eckart.methods.adapt.table import ADAPTERS
    from eckart.report.console import print_all
    from eckart.report.pages import adapter_page, adapter_values, adapters_table

    if as_json:
        print_json([adapter_values(each) for each in ADAPTERS] if name is None else adapter_values(name))
    else:
        print_all(adapters_table() if name is None else adapter_page(name))
