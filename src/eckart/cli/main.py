"""The commands. What is imported inside them would make `eckart --help` take seconds."""

import os
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.adapt import adapt, adapters, fold
from eckart.cli.guard import CONTINUES, INTERRUPTED, STARTS_AGAIN, guarded, print_json
from eckart.cli.options import EveryLayer, Json, require_model
from eckart.errors import EckartError

app = typer.Typer(
    help="Compress and adapt neural networks with structured linear maps.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Elastic = Annotated[bool, typer.Option("--elastic", help="Make a folder that also loads at every smaller size.")]
Least = Annotated[
    float | None, typer.Option(help="Smallest size of an elastic folder, as a share like --keep.  [default: 0.5]")
]
Keep = Annotated[
    float | None,
    typer.Option(
        help="Share of the whole model's parameters that remains, in (0, 1].  "
        "[default: 0.6, or 1 for methods that only quantize]"
    ),
]
Size = Annotated[
    str | None, typer.Option("--bytes", metavar="SIZE", help="Instead: bytes of all parameters, 20MB or 20MiB.")
]
FlopsShare = Annotated[
    str | None, typer.Option(metavar="SHARE", help="Instead: share of the linear layers' operations, as in 0.6x.")
]
TimeShare = Annotated[
    str | None, typer.Option(metavar="SHARE", help="Instead: share of their time per token, measured here, as in 0.7x.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eckart {version('eckart')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress and adapt neural networks with structured linear maps."""


@app.command()
@guarded(CONTINUES)
def compress(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face decoder or encoder.")],
    keep: Keep = None,
    nbytes: Size = None,
    flops: FlopsShare = None,
    latency: TimeShare = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not hold anything yet.")] = None,
    method: Annotated[str, typer.Option(help="Name of a method; `eckart methods` lists them.")] = "eckart",
    calibration: Annotated[Path | None, typer.Option(help="Text the method learns the layers' inputs from.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration samples.  [default: 128 windows, or 2048 lines drawn from all]")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per sample.  [default: 256]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method.")
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Only print what every layer would become.")] = False,
    elastic: Elastic = False,
    least: Least = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no statistics for later runs.")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Publish the result without loading it.")] = False,
    every_layer: EveryLayer = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller: dense weights become structured maps under a budget, measured before and after."""
    if out is None and not only_plan:
        raise typer.BadParameter("give a folder to write, or --plan to write nothing", param_hint="--out")
    _require_sizes(keep, elastic, least)
    require_model(model)
    if calibration is not None and not calibration.is_file():
        raise EckartError(f"there is no text file {calibration}")
    if out is not None and not only_plan and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EckartError(f"the output {out} already exists; give a new or an empty folder")

    from eckart.cli.progress import Bars
    from eckart.cli.settings import parse_settings
    from eckart.methods.compress.pipeline import compress as run_compress
    from eckart.methods.compress.pipeline import plan as run_plan
    from eckart.report.console import print_all
    from eckart.report.tables import outcome_table, plan_table

    arguments: dict[str, Any] = {
        "method": method, "keep": keep, "bytes": nbytes, "flops": flops, "latency": latency,
        "calibration": calibration, "samples": samples, "length": length, "seed": seed,
        "settings": parse_settings(method, settings or []), "cache": not no_cache,
        "elastic": elastic, "least": 0.5 if least is None else least,
    }  # fmt: skip
    values: dict[str, Any]
    with Bars() as progress:
        if only_plan or out is None:
            planned = run_plan(model, **arguments, progress=progress)
            values, table = planned.as_dict(), plan_table(planned, every_layer)
        else:
            outcome = run_compress(model, out, **arguments, check=not no_check, progress=progress)
            values, table = outcome.as_dict(), outcome_table(outcome, every_layer)
    print_json(values) if as_json else print_all(table)


app.command()(adapt)
app.command("adapters")(adapters)
app.command("fold")(fold)


@app.command("eval")
@guarded(STARTS_AGAIN)
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model folder, dense or compressed.")],
    text: Annotated[Path | None, typer.Option(help="Text to score with a decoder, plain or gzip, or .jsonl.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Tab-separated sentence1, sentence2, score, for a sentence encoder.")
    ] = None,
    labelled: Annotated[Path | None, typer.Option(help="Labelled rows, .jsonl or .tsv, for a classifier.")] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of a labelled sentence.")] = "text",
    label_field: Annotated[str, typer.Option(help="Field or column of its label.")] = "label",
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Folder of a saved adapter to put on the model; may be given again.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens read at once.  [default: the context, 2048 at most]")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a window advances.  [default: half the length]")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents, pairs or rows.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model: loss on text, rank correlation on scored sentence pairs, or accuracy on labelled rows."""
    given = [source for source in (text, pairs, labelled) if source is not None]
    if len(given) != 1:
        raise typer.BadParameter(
            "give one of --text (decoders), --pairs (sentence encoders) and --labelled (classifiers)",
            param_hint="--text",
        )
    require_model(model)
    if not given[0].is_file():
        raise EckartError(f"there is no file {given[0]}")

    from eckart.cli.progress import Bars
    from eckart.methods.evaluate import evaluate as run
    from eckart.report.console import print_all
    from eckart.report.tables import evaluation_table

    with Bars() as progress:
        found = run(
            model, text=text, pairs=pairs, labelled=labelled, text_field=text_field, label_field=label_field,
            adapters=adapter or (), length=length, stride=stride, limit=limit, progress=progress,
        )  # fmt: skip
    print_json(found.as_dict()) if as_json else print_all(evaluation_table(found))


@app.command()
@guarded(STARTS_AGAIN)
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the compression methods, or print one method's formula, source and settings."""
    from eckart.methods.compress.table import METHODS
    from eckart.report.console import print_all
    from eckart.report.pages import method_page, method_values, methods_table

    if as_json:
        print_json([method_values(each) for each in METHODS] if name is None else method_values(name))
    else:
        print_all(methods_table() if name is None else method_page(name))


@app.command()
@guarded(STARTS_AGAIN)
def show(
    folder: Annotated[Path, typer.Argument(help="Model folder, or a difference.")],
    every_layer: EveryLayer = False,
    as_json: Json = False,
) -> None:
    """Print what a compressed folder holds, from its headers alone; or what `eckart delta` wrote."""
    if not (folder / "delta.json").is_file():
        require_model(folder)

    from eckart.files.delta import show_delta
    from eckart.files.inspect import show as run
    from eckart.report.console import print_all
    from eckart.report.delta import difference_table
    from eckart.report.tables import contents_table

    if (folder / "delta.json").is_file():
        held = show_delta(folder)
        print_json(held.as_dict()) if as_json else print_all(difference_table(held, every_layer))
        return
    contents = run(folder)
    print_json(contents.as_dict()) if as_json else print_all(contents_table(contents, every_layer))


@app.command()
@guarded(STARTS_AGAIN)
def densify(
    folder: Annotated[Path, typer.Argument(help="Compressed folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not hold anything yet.")],
    keep: Annotated[float | None, typer.Option(help="Size of an elastic folder.  [default: its largest]")] = None,
) -> None:
    """Write a compressed folder as an ordinary dense one, which loads without eckart."""
    require_model(folder)

    from eckart.cli.progress import Bars
    from eckart.files.inspect import densify as run
    from eckart.files.slicing import sliced

    with Bars() as progress, nullcontext(folder) if keep is None else sliced(folder, out, keep, progress) as source:
        run(source, out, progress)
    typer.echo(f"written to {out}")


@app.command("slice")
@guarded(STARTS_AGAIN)
def slice_(
    folder: Annotated[Path, typer.Argument(help="Elastic folder, made by `eckart compress --elastic`.")],
    keep: Annotated[float, typer.Option(help="Share of the dense model's parameters that remains.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not hold anything yet.")],
) -> None:
    """Write an elastic folder at a smaller size, without data."""
    require_model(folder)

    from eckart.cli.progress import Bars
    from eckart.files.slicing import slice_folder as run

    with Bars() as progress:
        run(folder, out, keep=keep, progress=progress)
    typer.echo(f"written to {out}")


@app.command()
@guarded(STARTS_AGAIN)
def delta(
    base: Annotated[Path, typer.Argument(help="Folder of the model that was fine-tuned.")],
    tuned: Annotated[Path, typer.Argument(help="Folder of the fine-tuned model.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not hold anything yet.")],
    keep: Annotated[
        float | None, typer.Option(help="Share of the tuned model's bytes to take, in (0, 1].  [default: 0.1]")
    ] = None,
    nbytes: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Instead: how many bytes, 200KB or 1.5MiB.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="4, 8 or 16 for all factors.  [default: 2 to 8, by component]")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text like that the model was tuned on.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples.  [default: 128 windows]")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per sample.  [default: 256]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no statistics for later runs.")] = False,
    every_tensor: Annotated[bool, typer.Option("--every-tensor", help="One row per tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Store a fine-tuned model as a small difference from its base."""
    require_model(base)
    require_model(tuned)
    if calibration is not None and not calibration.is_file():
        raise EckartError(f"there is no text file {calibration}")

    from eckart.cli.progress import Bars
    from eckart.methods.delta.ere import delta as run
    from eckart.report.console import print_all
    from eckart.report.delta import delta_table

    arguments: dict[str, Any] = {
        "keep": keep, "bytes": nbytes, "bits": bits, "calibration": calibration, "samples": samples,
        "length": length, "seed": seed, "cache": not no_cache,
    }  # fmt: skip
    with Bars() as progress:
        made = run(base, tuned, out, **arguments, progress=progress)
    print_json(made.as_dict()) if as_json else print_all(delta_table(made, every_tensor))


@app.command()
@guarded(STARTS_AGAIN)
def restore(
    base: Annotated[Path, typer.Argument(help="Folder of the base that the difference was made from.")],
    folder: Annotated[Path, typer.Argument(metavar="DELTA", help="Folder that `eckart delta` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not hold anything yet.")],
    as_json: Json = False,
) -> None:
    """Write the model that a base and a difference make, as an ordinary folder."""
    require_model(base)

    from eckart.cli.progress import Bars
    from eckart.files.delta import restore as run

    with Bars() as progress:
        made = run(base, folder, out, progress=progress)
    print_json(made.as_dict()) if as_json else typer.echo(f"written to {out}: {made.tensors} tensors")


@app.command()
@guarded("interrupted")
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the compressed models.  [default: a temporary one]")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the parameters that remains, in (0, 1].")] = 0.6,
) -> None:
    """Compress a small story model that comes with eckart, in a minute, and compare."""
    if not 0.0 < keep <= 1.0:
        raise EckartError(f"keep is the share of parameters that remains and must lie in (0, 1], got {keep:g}")

    from eckart.cli.demo import PROMPT, demonstrate
    from eckart.cli.progress import Bars
    from eckart.report.console import print_all
    from eckart.report.tables import comparison_table

    with Bars() as progress:
        samples = demonstrate(out, keep, progress)
    print_all(comparison_table([(s.name, s.parameters, s.nbytes, s.evaluation) for s in samples]))
    typer.echo(f"\ncontinuations of {PROMPT!r}:")
    for sample in samples:
        typer.echo(f"\n{sample.name}: {sample.continuation}")
    typer.echo(f"\nthe compressed models are in {samples[-1].folder.parent}")


def _require_sizes(keep: float | None, elastic: bool, least: float | None) -> None:
    """Find sizes that cannot be before anything heavy is imported."""
    if least is not None and not elastic:
        raise typer.BadParameter("only an elastic folder has a least size; give --elastic", param_hint="--least")
    if keep is not None and not 0.0 < keep <= 1.0:
        raise EckartError(f"keep is the share of parameters that remains and must lie in (0, 1], got {keep:g}")


def run() -> None:
    """The console entry point."""
    # Threads that spin for long while they wait make a busy machine several times slower (docs/LOG.md); read by torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app(prog_name="eckart")
    except KeyboardInterrupt:  # before a command began
        sys.exit(INTERRUPTED)
