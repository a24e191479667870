"""How long layers take on this device: measured once at a few sizes, kept on disk, interpolated between them.

All sizes of one shape and structure take turns with the dense layer, so that what a busy machine does to one it does to
all. Times rise with the size: what noise says otherwise is averaged (isotonic regression).
"""

import bisect
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eckart.atomic import write_json
from eckart.errors import EckartError
from eckart.hosts.timing import medians

# Raised whenever the way of measuring changes, so that older tables are not read.
FORMAT = 1
# Sizes measured of one structure and shape.
POINTS = 8
# One timing lasts about this long; calls are repeated until the dense layer takes it.
LEAST_SECONDS = 1e-3
MOST_CALLS = 1000

# Makes what is to be timed: name -> one call.
Tasks = Callable[[], Mapping[str, Callable[[], object]]]


@dataclass(frozen=True, slots=True)
class Latencies:
    """The measured times of a device, in a folder.

    Attributes:
        folder: where the tables are.
        device: what is measured.
    """

    folder: Path
    device: torch.device

    def seconds(self, what: str, tasks: Tasks) -> dict[str, float]:
        """Return the seconds one call of each task takes, measured if nobody has done so yet.

        Args:
            what: names the tasks and all that decides their times.
            tasks: makes them; "dense" is one of them.

        Raises:
            EckartError: if the table is damaged.
        """
        key = f"{FORMAT} {device_name(self.device)} torch {torch.__version__} {torch.get_num_threads()} threads {what}"
        path = self.folder / f"latency-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if not path.is_file():
            write_json(path, {"key": key, "seconds": measured(tasks())})
        try:
            held = json.loads(path.read_text(encoding="utf-8"))["seconds"]
            return {name: float(value) for name, value in held.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EckartError(f"{path} is damaged ({error}); delete it and run again") from error


@torch.no_grad()
def measured(tasks: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of one call of each task; all of them take turns, each many calls long."""
    once = medians({"dense": tasks["dense"]}, seconds=0.0)["dense"]
    calls = min(max(round(LEAST_SECONDS / max(once, 1e-9)), 1), MOST_CALLS)

    def repeated(task: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                task()

        return run

    taken = medians({name: repeated(task) for name, task in tasks.items()})
    return {name: seconds / calls for name, seconds in taken.items()}


def device_name(device: torch.device) -> str:
    """Return what the device is called by its maker, as far as that can be known."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{device.type} {model or platform.processor() or platform.machine()}"


def grid(sizes: Sequence[int]) -> list[int]:
    """Return the sizes to measure: the smallest, the largest, and some between, evenly."""
    ordered, steps = sorted(set(sizes)), max(POINTS - 1, 1)
    return sorted({ordered[round(i * (len(ordered) - 1) / steps)] for i in range(POINTS)}) if ordered else []


def rising(values: Sequence[float]) -> list[float]:
    """Return the non-decreasing sequence nearest to the values in least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean and length
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, length = pools.pop()
            mean, count = (before * length + mean * count) / (length + count), length + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def between(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    """Return the value at a size, on straight lines between the given ones and constant beyond them.

    Args:
        sizes: ascending.
        values: those measured there.
        size: where to.
    """
    at = bisect.bisect_left(sizes, size)
    if at == 0 or at == len(sizes):
        return values[min(at, len(sizes) - 1)]
    share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
    return values[at - 1] + share * (values[at] - values[at - 1])
