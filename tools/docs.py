"""Writes the generated pages of docs/: methods.md and adapters.md from docstrings, benchmarks.md from measured results.

python tools/docs.py            writes them
python tools/docs.py --check    fails if a page differs from what would be written
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from compression_claims import compression_claims
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eckart.methods.adapt.combining import COMBINATIONS
from eckart.methods.adapt.table import ADAPTERS, adapter_settings, adapter_source, adapter_summary
from eckart.methods.compress.table import METHODS, settings_of, source_of, summary_of
from eckart.methods.pages import Setting
from finetunes import claims, finetunes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
# What a row of the compression benchmark says beside what it measured.
NOT_MEASURES = {
    *("model", "variant", "keep", "settings", "kept", "bytes", "seconds", "predicted", "unit", "samples", "error"),
    *("peak", "speeds", "machine", "date"),
}


def type_name(annotation: Any) -> str:
    """Return a type as readers of the documentation know it."""
    options = get_args(annotation)
    return ", ".join(map(str, options)) if options else getattr(annotation, "__name__", str(annotation))


def methods() -> list[dict[str, Any]]:
    """Return what docs/methods.md says of every method."""
    return [_described(name, summary_of(name), source_of(name), settings_of(name)) for name in METHODS]


def adapters() -> list[dict[str, Any]]:
    """Return what docs/adapters.md says of every method."""
    out = [_described(name, adapter_summary(name), adapter_source(name), adapter_settings(name)) for name in ADAPTERS]
    for i, method in enumerate(out):  # a heading that was there already gets a number
        before = sum(other["anchor"] == method["anchor"] for other in out[:i])
        method["anchor"] += f"-{before}" if before else ""
    return out


def combinations() -> list[dict[str, Any]]:
    """Return what docs/adapters.md says of every way to combine adapters."""
    return [
        _described(name, adapter_summary(name), adapter_source(name), adapter_settings(name)) for name in COMBINATIONS
    ]


def _described(name: str, summary: str, page: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
    listed = [
        {"name": s.name, "type": type_name(s.type), "default": s.default, "common": s.common} for s in settings.values()
    ]
    anchor = "".join(c for c in name if c.isalnum() or c in "-_")
    return {"name": name, "anchor": anchor, "summary": summary, "page": page, "settings": listed}


def results(name: str) -> dict[str, Any]:
    """Return measured results, or none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def tables(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arrange the rows of the compression benchmark: one table per model and measure, a line per variant."""
    out = []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        keeps = sorted({r["keep"] for r in mine if r["variant"] != "dense"}, reverse=True)
        for measure in dict.fromkeys(key for r in mine for key in r if key not in NOT_MEASURES):
            at = {(r["variant"], r["keep"]): r for r in mine}
            lines = [
                (variant, [at.get((variant, keep), {}).get(measure) for keep in keeps])
                for variant in dict.fromkeys(r["variant"] for r in mine)
                if variant != "dense" and any(measure in r for r in mine if r["variant"] == variant)
            ]
            dense = at["dense", 1.0][measure]
            larger = measure in ("STS-B", "TREC")
            best = [_best([v[i] for n, v in lines if not _is_trained(n)], larger) for i in range(len(keeps))]
            lines.sort(key=lambda line: (_is_trained(line[0]), _order(line[1], larger)))
            out.append(
                {"model": model, "measure": measure, "dense": dense, "keeps": keeps, "lines": lines, "best": best}
            )
    return out


def _is_trained(variant: str) -> bool:
    return " healed" in variant or " trained" in variant


def _best(values: list[float | None], larger: bool) -> float | None:
    held = [v for v in values if v is not None]
    return (max(held) if larger else min(held)) if held else None


def _order(values: list[float | None], larger: bool) -> float:
    held = [v for v in values if v is not None]
    mean = sum(held) / max(len(held), 1)
    return -mean if larger else mean


def costs(rows: list[dict[str, Any]], keeps: tuple[float, ...] = (0.8, 0.6, 0.5)) -> list[dict[str, Any]]:
    """Arrange what the rows of the compression benchmark cost: one table per model, a line per variant."""

    def cell(mine: list[dict[str, Any] | None], form: str, value: Callable[[dict[str, Any]], float]) -> str:
        return "\u00a0/\u00a0".join("–" if r is None else form % value(r) for r in mine)

    out = []
    for model in dict.fromkeys(r["model"] for r in rows):
        at = {(r["variant"], r["keep"]): r for r in rows if r["model"] == model and "speeds" in r}
        lines = []
        for variant in dict.fromkeys(name for name, _ in at):
            mine = [at.get((variant, keep)) for keep in keeps]
            held = [r for r in mine if r is not None]
            if not held:
                continue
            line = [cell(mine, "%.0f", lambda r: r["seconds"]), f"{max(r['peak'] for r in held) / 1e6:.0f}"]
            line.append(cell(mine, "%.1f", lambda r: r["bytes"] / 1e6))
            for task in held[0]["speeds"]:
                speeds = [r and r["speeds"][task] for r in mine]
                line.append(cell(speeds, "%.2f", lambda speed: speed["compressed"] / speed["dense"]))
                line.append(cell(speeds, "%.0f", lambda speed: speed["compressed"]))
            lines.append((variant, line))
        if lines:
            tasks = list(next(iter(at.values()))["speeds"])
            lines.sort(key=lambda line: line[0])
            out.append({"model": model, "tasks": tasks, "lines": lines})
    return out


def over_seeds(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return rows that differ in their seed alone as one: means, their spread, and from how many."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(_flat(row))
    out = []
    for mine in groups.values():
        numbers = [key for key, value in mine[0].items() if isinstance(value, float)]
        means = {key: statistics.fmean(row[key] for row in mine) for key in numbers}
        spread = {key: statistics.stdev([row[key] for row in mine]) if len(mine) > 1 else 0.0 for key in numbers}
        out.append({**mine[0], **means, "spread": spread, "seeds": len(mine)})
    return out


def _flat(row: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return a row without rows inside: {"alone": {"trec": 1.0}} as {"alone.trec": 1.0}."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        out |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return out


def refusals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was refused: model, variant, budgets, and the sentence."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for r in rows:
        if "error" in r:
            found.setdefault((r["model"], r["variant"], r["error"]), []).append(r["keep"])
    return [
        {"model": model, "variant": variant, "error": error, "keeps": sorted(keeps, reverse=True)}
        for (model, variant, error), keeps in found.items()
    ]


def headline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how much of the loss that svd-llm adds eckart does not, by model and budget."""
    at = {(r["model"], r["variant"], r["keep"]): r for r in rows}
    out = []
    for (model, variant, keep), row in at.items():
        rival = at.get((model, "svd-llm", keep))
        dense = at.get((model, "dense", 1.0))
        if variant == "eckart" and rival and dense:
            for measure in ("loss A",) if "loss A" in row else ("distance", "STS-B"):
                damage = abs(rival[measure] - dense[measure])
                left = abs(row[measure] - dense[measure])
                at_all = {"dense": dense[measure], "svd-llm": rival[measure], "eckart": row[measure]}
                out.append({"model": model, "keep": keep, "measure": measure, **at_all, "less": 1 - left / damage})
    models = list(dict.fromkeys(r["model"] for r in rows))
    return sorted(out, key=lambda r: (models.index(r["model"]), r["measure"] == "STS-B", -r["keep"]))


def pages() -> dict[Path, str]:
    """Return the generated pages by path."""
    environment = Environment(
        loader=FileSystemLoader(ROOT / "tools/templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown from our own figures
    )
    compression = results("compression")
    values = {
        "methods": methods(),
        "adapters": adapters(),
        "combinations": combinations(),
        "compression": compression,
        "tables": tables(compression["rows"]),
        "headline": headline(compression["rows"]),
        "refusals": refusals(compression["rows"]),
        "compression_claims": compression_claims(compression["rows"]),
        "costs": costs(compression["rows"]),
        "solver": results("solver"),
        "speed": results("speed"),
        "memory": results("memory"),
        "constants": results("constants"),
        "sparse_coding": results("sparse_coding"),
        "elastic": results("elastic"),
        "attention": results("attention"),
        "equal_bytes": results("equal_bytes"),
        "delta": results("delta"),
        "adapter_costs": results("adapters"),
        "finetunes": results("finetunes"),
        "finetuned": finetunes(results("finetunes")["rows"]),
        "claims": claims(results("finetunes")["rows"]),
        "federated": results("federated"),
        "over_seeds": over_seeds,
        "interference": results("interference"),
        "starts": results("starts"),
        "rates": results("rates"),
        "kernels": results("kernels"),
    }
    return {
        ROOT / f"docs/{name}.md": environment.get_template(f"{name}.md.jinja").render(values)
        for name in ("methods", "adapters", "benchmarks")
    }


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    if check and stale:
        sys.exit(f"{', '.join(p.name for p in stale)} should be written anew: python tools/docs.py")
    for path in stale:
        path.write_text(pages()[path])
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
