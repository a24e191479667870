"""Progress bars for what takes longer than two seconds, on stderr and only on a terminal."""

import shutil
import sys
import time
from types import TracebackType

from tqdm import tqdm

# Seconds a command runs before it shows a bar.
PATIENCE = 2.0


class Bars:
    """Shows one stage after the other; call it as `progress(stage, done, total)`, use it as a context."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stage = ""
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are done."""
        if self._bar is None or stage != self._stage or total != self._bar.total or done < self._bar.n:
            self.close()
            wait = max(0.0, PATIENCE - (time.monotonic() - self._started))
            self._stage = stage
            # tqdm itself shows nothing on terminals that do not know their size. disable=None: only on a terminal.
            width, height = shutil.get_terminal_size()
            self._bar = tqdm(
                total=total,
                desc=stage,
                delay=wait,
                ncols=width,
                nrows=height,
                leave=False,
                disable=None,
                file=sys.stderr,
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
