"""Pages of methods: functions whose signature is the configuration and whose docstring is the documentation."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from eckart.errors import EckartError

Page = TypeVar("Page")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a method.

    Attributes:
        name: as written in `--set name=value`.
        type: its annotation.
        default: its value if not set.
        common: whether every method has it.
    """

    name: str
    type: Any
    default: Any
    common: bool


def page_named(pages: Mapping[str, Page], method: str) -> Page:
    """Return the page of a method.

    Raises:
        EckartError: for an unknown method, with the nearest names.
    """
    if method not in pages:
        raise EckartError(f"unknown method {method!r}; {nearest(method, list(pages))}")
    return pages[method]


def signature_of(page: Callable[..., Any]) -> dict[str, Setting]:
    """Return the settings that a page's signature names."""
    hints = get_type_hints(page)
    parameters = inspect.signature(page).parameters.values()
    return {p.name: Setting(p.name, hints[p.name], p.default, False) for p in parameters}


def check_settings(method: str, known: Mapping[str, Setting], given: Mapping[str, Any]) -> None:
    """Raise an `EckartError` for a setting that a method does not have, or a value of the wrong type."""
    for name, value in given.items():
        if name not in known:
            raise EckartError(f"{method} has no setting {name!r}; {nearest(name, list(known))}")
        _check_type(method, known[name], value)


def _check_type(method: str, setting: Setting, value: Any) -> None:
    choices = get_args(setting.type)
    if choices:
        fits, expected = value in choices, f"one of {', '.join(map(str, choices))}"
    elif setting.type is bool:
        fits, expected = isinstance(value, bool), "true or false"
    elif setting.type is int:
        fits, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        expected = "a finite number"
    if not fits:
        raise EckartError(f"the setting {setting.name} of {method} must be {expected}, got {value!r}")


def nearest(name: str, options: Sequence[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest one, and which there are."""
    near = difflib.get_close_matches(str(name).lower(), options, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? There are {', '.join(options)}" if near else f"there are {', '.join(options)}"


def first_line(page: Callable[..., Any]) -> str:
    """Return the first line of a page's docstring."""
    return (inspect.getdoc(page) or "").splitlines()[0]


def text_of(page: Callable[..., Any]) -> str:
    """Return the docstring of the file a page is in: formula, answers and source."""
    return inspect.getdoc(inspect.getmodule(page)) or ""
