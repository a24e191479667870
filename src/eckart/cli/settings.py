"""Reading `--set name=value`: the types come from the signatures of the methods."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eckart.errors import EckartError
from eckart.methods.adapt.table import adapter_recipe, adapter_settings, require_adapter
from eckart.methods.compress.table import recipe_of, settings_of
from eckart.methods.pages import Setting

EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def parse_settings(method: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Return typed settings of a method of compression from "name=value" texts.

    Raises:
        EckartError: for an unknown method or setting (with the nearest names), or a value of the wrong type or range.
    """
    return _parsed(method, assignments, settings_of(method), recipe_of)


def parse_adapter_settings(method: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Return typed settings of a method of adaptation from "name=value" texts; errors are those of `parse_settings`."""
    require_adapter(method)
    return _parsed(method, assignments, adapter_settings(method), adapter_recipe)


def _parsed(
    method: str,
    assignments: Sequence[str],
    known: Mapping[str, Setting],
    check: Callable[[str, Mapping[str, Any]], object],
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise EckartError(f"--set takes name=value, got {assignment!r}")
        if name in out:
            raise EckartError(f"{name} is set twice; give it once")
        if name in known:
            out[name] = _typed(method, known[name], text)
        else:
            check(method, {name: text})  # raises, with the nearest names
    check(method, out)  # checks ranges
    return out


def _typed(method: str, setting: Setting, text: str) -> Any:
    try:
        return TypeAdapter(setting.type).validate_python(text)
    except ValidationError as error:
        choices = getattr(setting.type, "__args__", ())
        expected = EXPECTED.get(setting.type) or "one of " + ", ".join(map(str, choices))
        raise EckartError(f"the setting {setting.name} of {method} must be {expected}, got {text!r}") from error
