"""The model card of a compressed folder: what was done, with which settings, and what was measured.

The text is the template `card.md.jinja` beside this file; here its values are put into words.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from eckart.errors import EckartError
from eckart.files.folder import check_model_folder

TEMPLATE = Path(__file__).with_name("card.md.jinja")
# What a card may take over from the original's card; anything else may no longer be true of the compressed model.
INHERITED = ("license", "license_name", "license_link", "language")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
_SCALAR = re.compile(r"^([a-z_]+):[ \t]*([^\s\[{|>&*#\"'][^\r\n]*?)[ \t]*$", re.MULTILINE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(
    name: str, settings: Mapping[str, Any], figures: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]
) -> str:
    """Return the README.md of a compressed folder: YAML front matter, how to load it, what was measured.

    Args:
        name: name of the original model.
        settings: everything that decided the result, by name (a mapping's entries are listed as settings of their own);
            "method" is also named in the text.
        figures: "parameters_before", "parameters_after", "bytes_before", "bytes_after"; optionally "measured" (a
            mapping with name, before, after, tokens, held_out), "checked" (what a fresh process held the folder to,
            a mapping with what, tolerance, tokens), "auto_class" (the transformers class that loads it),
            "method_summary" (one sentence), and what `inherited` returns for the original folder.
        layers: for every layer its structure, rank, numbers and dense_numbers.

    Raises:
        EckartError: if jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise EckartError(
            "the model card needs jinja2, which is not installed; run: pip install 'eckart[hf]'"
        ) from error
    measured = figures.get("measured")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # Markdown: no escapes
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=[(key, json.dumps(value)) for key, value in _metadata(figures).items()],  # JSON is YAML
        name=name,
        base_model=figures.get("base_model"),
        method=settings.get("method"),
        method_summary=figures.get("method_summary"),
        kept=f"{100 * figures['parameters_after'] / figures['parameters_before']:.1f} %",
        auto_class=figures.get("auto_class") or _auto_class(measured),
        figures=_figure_rows(figures, measured),
        measured_on=_measured_on(measured) if measured else None,
        checked=figures.get("checked"),
        structures=_structure_rows(layers),
        settings=list(_setting_rows(settings)),
    )


def inherited(folder: Path) -> dict[str, str]:
    """Return what a compressed model's card takes over from the original folder, for the `figures` of `model_card`.

    That is the licence and language if its card states them as plain values, and "base_model" if its config or card
    names a model on the Hub.

    Raises:
        EckartError: if the folder has no readable config.json.
    """
    stated = _front_matter(folder / "README.md")
    out = {key: stated[key] for key in INHERITED if key in stated}
    names = (check_model_folder(folder).get("_name_or_path"), stated.get("base_model"))
    base = next((name for name in names if isinstance(name, str) and _HUB_NAME.fullmatch(name)), None)
    return {**out, "base_model": base} if base else out


def _front_matter(card: Path) -> dict[str, str]:
    """Return the plain one-line values of a card's front matter; lists and quoted texts are left out."""
    if not card.is_file():
        return {}
    block = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    return dict(_SCALAR.findall(block[1])) if block else {}


def _metadata(figures: Mapping[str, Any]) -> dict[str, Any]:
    taken = {key: figures[key] for key in (*INHERITED, "base_model") if figures.get(key)}
    return {"library_name": "transformers", "tags": ["eckart", "compressed", "low-rank"], **taken}


def _auto_class(measured: Mapping[str, Any] | None) -> str:
    """Guess the class from what was measured: sentence encoders have a distance instead of a loss."""
    return "AutoModel" if measured and measured["name"] == "distance" else "AutoModelForCausalLM"


def _figure_rows(figures: Mapping[str, Any], measured: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    rows = [
        ("parameters", f"{figures['parameters_before']:,}", f"{figures['parameters_after']:,}"),
        ("bytes", f"{figures['bytes_before']:,}", f"{figures['bytes_after']:,}"),
    ]
    if measured:
        label = "loss, nats per token" if measured["name"] == "loss" else str(measured["name"])
        rows.append((label, f"{measured['before']:.4f}", f"{measured['after']:.4f}"))
    return rows


def _measured_on(measured: Mapping[str, Any]) -> str:
    seen = "held-out tokens that the fits did not see" if measured["held_out"] else "tokens of the calibration text"
    return f"The {measured['name']} was measured on {measured['tokens']:,} {seen}."


def _structure_rows(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(layer["structure"], []).append(layer)
    rows = []
    for structure, members in sorted(groups.items()):
        low, high = min(m["rank"] for m in members), max(m["rank"] for m in members)
        ranks = "full" if structure == "dense" else str(low) if low == high else f"{low} to {high}"
        before, after = (sum(m[key] for m in members) for key in ("dense_numbers", "numbers"))
        rows.append((structure, f"{len(members)}", ranks, f"{before:,}", f"{after:,}"))
    return rows


def _setting_rows(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _setting_rows(value)
        elif value is not None:
            yield key, _plain(value)


def _plain(value: Any) -> str:
    """Return a value as text; of a path only the last part, since the rest says where somebody keeps their files."""
    if isinstance(value, PurePath) or (isinstance(value, str) and PurePath(value).is_absolute()):
        return PurePath(value).name
    return str(value)
