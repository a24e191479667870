"""What storing a fine-tuned model as a difference did: the answer of `eckart.delta`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """What is stored of one tensor.

    Attributes:
        name: its name in the tuned model.
        shape: its shape there.
        structure: "same" or "base" (nothing is stored, since nothing changed or it is not worth a byte), "exact", "full
            int3" (all of the difference as codes), or its low-rank terms, as "lowrank 8x4 bit + 40x2 bit".
        nbytes: bytes stored.
        before: error if nothing were stored, in the delta's unit; 0 if the tensor had no choice.
        after: error as stored, before the sum is rounded.
    """

    name: str
    shape: tuple[int, ...]
    structure: str
    nbytes: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Delta:
    """What `delta` wrote.

    Attributes:
        out: the folder.
        tuned_bytes: bytes of the tuned model's tensors.
        nbytes: bytes of all files in the folder.
        unit: what errors are measured in: "nats per token", predicted, or "squared error" without a text.
        tensors: every tensor of the tuned model.
    """

    out: Path
    tuned_bytes: int
    nbytes: int
    unit: str
    tensors: tuple[TensorDelta, ...]

    @property
    def share(self) -> float:
        """What the folder takes of the tuned model's bytes."""
        return self.nbytes / self.tuned_bytes

    @property
    def before(self) -> float:
        """The error of the base alone, all tensors together."""
        return sum(tensor.before for tensor in self.tensors)

    @property
    def after(self) -> float:
        """The error as stored, all tensors together."""
        return sum(tensor.after for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        own = {"share": self.share, "before": self.before, "after": self.after}
        return {**asdict(self), "out": str(self.out), **own}
