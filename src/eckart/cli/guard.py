"""How a command ends: errors in one sentence on stderr, Ctrl-C with a word on what comes next, JSON free of NaN."""

import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import typer

from eckart.errors import EckartError

INTERRUPTED = 130  # what shells report of a program stopped by Ctrl-C
CONTINUES = "interrupted; running the same command again continues where this one stopped"
STARTS_AGAIN = "interrupted; nothing was written, running the same command again starts from the beginning"
_Command = TypeVar("_Command", bound=Callable[..., None])


def guarded(interrupted: str) -> Callable[[_Command], _Command]:
    """Make a command report errors in one sentence and exit with 1, or 130 after Ctrl-C.

    Args:
        interrupted: the sentence to end with after Ctrl-C.
    """

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                try:
                    command(*args, **kwargs)
                    sys.stdout.flush()
                except EckartError as error:
                    _end(str(error), 1)
                except KeyboardInterrupt:
                    _end(interrupted, INTERRUPTED)
                except BrokenPipeError:  # whoever read the output has seen enough; nothing may be flushed to it at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    raise typer.Exit(1) from None
                except OSError as error:
                    _end(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
                except MemoryError:
                    _end("there is not enough memory; close other programs or use fewer and shorter samples", 1)

        return run  # type: ignore[return-value]

    return decorate


def _end(sentence: str, code: int) -> NoReturn:
    typer.echo(f"eckart: {sentence}", err=True)
    raise typer.Exit(code) from None


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """Show a warning without the line of code it came from."""
    typer.echo(f"eckart: warning: {message}", err=True)


def print_json(value: Any) -> None:
    """Print one JSON document; NaN and infinities, which JSON does not have, become null."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
