"""Printing: as wide as the terminal, or as wide as the content where the output is a file or a pipe."""

import sys
from typing import IO

from rich.console import Console, RenderableType

# Wider than any table: nothing that goes into a file or a pipe is folded or cut.
UNLIMITED = 10_000


def console(file: IO[str] | None = None) -> Console:
    """Return a console on a stream, standard output by default; without colour and width limit if it is no terminal."""
    stream = file or sys.stdout
    terminal = stream.isatty()
    return Console(file=stream, width=None if terminal else UNLIMITED, highlight=False, markup=False, emoji=False)


def print_all(*parts: RenderableType, file: IO[str] | None = None) -> None:
    """Print tables and texts one below the other, without trailing blanks in pipes."""
    target = console(file)
    if target.is_terminal:
        target.print(*parts, sep="\n")
        return
    with target.capture() as captured:
        target.print(*parts, sep="\n")
    for line in captured.get().splitlines():
        target.file.write(line.rstrip() + "\n")
