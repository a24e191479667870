"""An answer of methods that remove whole blocks: what tells which, and what becomes of those that stay."""

from dataclasses import dataclass

from eckart.errors import EckartError


@dataclass(frozen=True, slots=True)
class Removal:
    """How blocks are chosen and removed.

    Attributes:
        macro: whether a block's influence is measured on the last block's output, anew after each removal; otherwise on
            its own output, once.
        group: blocks around the removed one, itself included, that are trained together.
        rank: of the updates and of the coefficients.
        epochs: passes over the calibration samples per removal; 0 for plain removal.
        rate: learning rate of the coefficients of the removed weights.
        base_rate: that of everything else.
    """

    macro: bool = False
    group: int = 2
    rank: int = 1
    epochs: int = 0
    rate: float = 1e-3
    base_rate: float = 1e-5

    def __post_init__(self) -> None:
        for name, least in (("group", 2), ("rank", 1), ("epochs", 0)):
            if getattr(self, name) < least:
                raise EckartError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("rate", "base_rate"):
            if not getattr(self, name) > 0:
                raise EckartError(f"{name} must be positive, got {getattr(self, name)}")
