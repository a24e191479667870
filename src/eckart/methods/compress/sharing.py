"""A sixth answer of a recipe: which layers have one basis or dictionary together, and how that is found."""

from dataclasses import dataclass

from eckart.errors import EckartError
from eckart.fit.clustering import Algorithm


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which layers share the factor at their input side.

    Only layers of one projection (all q, all gate, ...) share, and those alike in shape and dtype.

    Attributes:
        size: layers of adjacent blocks per group; None where clusters decide.
        algorithm: how clusters predict the joint error (fit/clustering.py); None for adjacent groups.
        threshold: largest allowed ratio of a cluster's joint error to that of its layers on their own.
        writers: whether projections that write to the residual stream share too: those whose output is as wide as it
            and which are alone with their input (o and down, but not q).
        rounds: alternations under each layer's own input moment; 0 for the sum of the group's. Of low rank only.
    """

    size: int | None = None
    algorithm: Algorithm | None = None
    threshold: float = 1.0
    writers: bool = False
    rounds: int = 0

    def __post_init__(self) -> None:
        if (self.size is None) == (self.algorithm is None):
            raise EckartError("layers share a factor in adjacent groups of a size, or in clusters by an algorithm")
        for name, value, least in (("group", self.size or 1, 1), ("rounds", self.rounds, 0)):
            if value < least:
                raise EckartError(f"{name} must be at least {least}, got {value}")
        if not self.threshold > 0:
            raise EckartError(f"threshold must be positive, got {self.threshold}")
