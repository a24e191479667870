"""Options and checks that several commands share."""

import difflib
from pathlib import Path
from typing import Annotated

import typer

from eckart.errors import EckartError

# What folders of adapters hold: eckart's and PEFT's.
ADAPTER_FILES = "eckart_adapter.json", "adapter_config.json"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
EveryLayer = Annotated[bool, typer.Option("--every-layer", help="One row per layer, however many there are.")]


def require_model(folder: Path) -> None:
    """Find a wrong MODEL before anything heavy is imported."""
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, _siblings(folder), n=1)
        hint = (
            f"did you mean {folder.with_name(near[0])}?" if near else "give a folder with config.json and safetensors"
        )
        raise EckartError(f"there is no model folder {folder}; {hint}")
    if (folder / "delta.json").is_file():
        raise EckartError(
            f"{folder} is a difference, not a model; `eckart restore BASE {folder}` makes the model of it"
        )
    if any((folder / name).is_file() for name in ADAPTER_FILES):
        raise EckartError(
            f"{folder} is an adapter, not a model; `eckart fold MODEL {folder} --out DIR` makes a model of it and of "
            "the one it was made for"
        )
    if not (folder / "config.json").is_file():
        raise EckartError(f"{folder} has no config.json; give the path of a Hugging Face model folder")


def _siblings(folder: Path) -> list[str]:
    return [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
