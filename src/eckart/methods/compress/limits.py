"""What a budget limits: parameters, bytes, operations or time; exactly one of them."""

import math
import re
from dataclasses import dataclass
from typing import Any

from eckart.budget import BYTES, FLOPS, NUMBERS, SECONDS, Measure
from eckart.errors import EckartError

# As users write them, with what each counts.
MEASURES = {"keep": NUMBERS, "bytes": BYTES, "flops": FLOPS, "latency": SECONDS}
UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of the model may remain.

    Attributes:
        option: what is limited: "keep", "bytes", "flops" or "latency".
        amount: bytes, or a share of the dense model.
    """

    option: str
    amount: float

    @property
    def measure(self) -> Measure:
        """What is counted."""
        return MEASURES[self.option]

    @property
    def value(self) -> float | str:
        """The amount as users write it."""
        return f"{self.amount:g}x" if self.option in ("flops", "latency") else self.amount

    def __str__(self) -> str:
        return f"{self.option} {self.amount:,}" if self.option == "bytes" else f"{self.option} {self.value}"

    def budget(self, total: float) -> float:
        """Return what may remain of a total."""
        return self.amount if self.option == "bytes" else self.amount * total

    def needed(self, amount: float, total: float) -> str:
        """Return, as users write it, what a given remainder would have to be allowed by."""
        return f"{amount:,.0f} bytes" if self.option == "bytes" else f"{amount / total:.3f}"


def limit_of(*, keep: Any = None, bytes: Any = None, flops: Any = None, latency: Any = None) -> Limit:
    """Return what is asked for.

    Args:
        keep: share of the parameters, in (0, 1].
        bytes: whole number, or text with a unit: "20MB" (decimal), "20MiB" (binary).
        flops: share of the dense model's operations, as in "0.6x".
        latency: share of the dense model's time, as in "0.7x".

    Raises:
        EckartError: for none or several of them, or one that cannot be read.
    """
    given = {"keep": keep, "bytes": bytes, "flops": flops, "latency": latency}
    asked = {option: value for option, value in given.items() if value is not None}
    if len(asked) > 1:
        raise EckartError(f"{' and '.join(asked)} are given, but a run has one budget; give one of {', '.join(given)}")
    for option, value in asked.items():
        if option == "keep":
            return Limit(option, _share(value))
        return Limit(option, parse_size(value) if option == "bytes" else parse_ratio(option, value))
    raise EckartError(f"no budget is given; give one of {', '.join(given)}")


def _share(keep: Any) -> float:
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0.0 < keep <= 1.0:
        raise EckartError(f"keep is the share of parameters that remains and must lie in (0, 1], got {keep!r}")
    return keep


def parse_size(value: int | str) -> int:
    """Return a number of bytes.

    Args:
        value: whole number, or text: "20MB", "1.5 GiB", "800000".

    Raises:
        EckartError: for anything else, or less than one byte.
    """
    found: float = math.nan
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)):
        found = float(match[1]) * UNITS.get(match[2].upper(), math.nan)
    if not found >= 1:  # NaN is not
        raise EckartError(f"bytes must be a size such as 20MB, 1.5GiB or 800000, got {value!r}")
    return int(found)


def parse_ratio(option: str, value: str) -> float:
    """Return a share of what the dense model takes.

    Args:
        option: "flops" or "latency".
        value: text, a number in (0, 1] and an x: "0.7x".

    Raises:
        EckartError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*x\s*", value) if isinstance(value, str) else None
    if match is None or not 0 < float(match[1]) <= 1:
        raise EckartError(
            f"{option} is a share of what the dense model takes, above 0 and at most 1, written as 0.7x; got {value!r}"
        )
    return float(match[1])
