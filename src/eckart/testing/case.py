"""What a law is run on, and how a broken law is reported."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eckart.maps import FAMILIES, LinearMap

# Relative to the largest entry; laws are checked in float64, where sums of a few products round at 1e-15.
TOLERANCE = 1e-10


class LawError(AssertionError):
    """A map breaks a law of the algebra; the message says which law, on which case, and what differed."""


@dataclass(frozen=True, slots=True)
class Case:
    """One instance of a map and the matrix it should be.

    Attributes:
        name: as shown when a law is broken.
        map: the instance, its numbers in float64.
        matrix: W (m, n), float64; made without the map's own code wherever that is possible.
        families: map classes by name, those that its spec mentions among them.
        numbers: how many numbers it is made of, where they are not simply its floating ones.
    """

    name: str
    map: LinearMap
    matrix: Tensor
    families: Mapping[str, type[LinearMap]] = field(default_factory=lambda: FAMILIES, repr=False)
    numbers: int | None = None

    def inputs(self, *lead: int, seed: int = 0) -> Tensor:
        """Return random inputs (*lead, n), float64, the same in every call."""
        return normal(*lead, self.matrix.shape[1], seed=seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers of a shape, float64, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expect(holds: bool, what: str) -> None:
    """Raise a `LawError` saying what is wrong unless the condition holds."""
    if not holds:
        raise LawError(what)


def expect_same(what: str, found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise a `LawError` with the evidence unless two tensors have one shape and agree entry by entry.

    Args:
        what: names the value compared.
        found: any dtype.
        wanted: compared in float64.
        tolerance: relative to the largest magnitude of `wanted`, or to 1 if that is smaller.
    """
    expect(found.shape == wanted.shape, f"{what} has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
    if not wanted.numel():
        return
    found, wanted = found.detach().double(), wanted.detach().double()
    difference = (found - wanted).abs().nan_to_num(nan=torch.inf)
    allowed = tolerance * max(1.0, float(wanted.abs().max()))
    wrong = int((difference > allowed).sum())
    if wrong:
        at = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        a, b = float(found[tuple(at)]), float(wanted[tuple(at)])
        ratio = f", ratio {a / b:.6g}" if b else ""
        raise LawError(
            f"{what} differs in {wrong} of {difference.numel()} entries (allowed {allowed:.2g}); "
            f"worst at {at}: {a:.9g}, expected {b:.9g}{ratio}"
        )
