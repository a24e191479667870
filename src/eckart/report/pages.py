"""The methods: a list with a line each, and the page of one; of compression and of adaptation alike."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eckart.methods.adapt.table import ADAPTERS, adapter_settings, adapter_source, adapter_summary
from eckart.methods.compress.table import METHODS, settings_of, source_of, summary_of
from eckart.methods.pages import Setting


def methods_table() -> Table:
    """Return the methods of compression with one line each."""
    return _listed(METHODS, summary_of)


def adapters_table() -> Table:
    """Return the methods of adaptation with one line each."""
    return _listed(ADAPTERS, adapter_summary)


def method_page(name: str) -> RenderableType:
    """Return the page of one method of compression: formula, source and settings."""
    return _page(name, summary_of(name), source_of(name), settings_of(name))


def adapter_page(name: str) -> RenderableType:
    """Return the page of one method of adaptation: formula, source and settings."""
    return _page(name, adapter_summary(name), adapter_source(name), adapter_settings(name))


def method_values(name: str) -> dict[str, Any]:
    """Return one method's page as plain values, for JSON."""
    return _values(name, summary_of(name), source_of(name), settings_of(name))


def adapter_values(name: str) -> dict[str, Any]:
    """Return one method's page as plain values, for JSON."""
    return _values(name, adapter_summary(name), adapter_source(name), adapter_settings(name))


def type_name(setting: Setting) -> str:
    """Return the type of a setting as users would write its values: "float", or the words to choose from."""
    choices = getattr(setting.type, "__args__", None)
    return " | ".join(str(c) for c in choices) if choices else str(getattr(setting.type, "__name__", setting.type))


def _listed(names: Iterable[str], summary: Callable[[str], str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for name in names:
        table.add_row(name, summary(name))
    return table


def _page(name: str, summary: str, source: str, settings: Mapping[str, Setting]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("setting", "type", "default"):
        table.add_column(heading, overflow="fold")
    for setting in settings.values():
        suffix = " (all methods)" if setting.common else ""
        table.add_row(setting.name + suffix, type_name(setting), str(setting.default))
    return Group(Text(f"{name}: {summary}"), Text(), Text(source), Text(), table)


def _values(name: str, summary: str, source: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
    listed = [
        {"name": s.name, "type": type_name(s), "default": s.default, "common": s.common} for s in settings.values()
    ]
    return {"name": name, "summary": summary, "page": source, "settings": listed}
