"""What a compression run plans and what it measured: the answers of `eckart.plan` and `eckart.compress`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer becomes.

    Attributes:
        name: its module name.
        kind: "linear", "embedding" (with the head tied to it, if it is) or "head".
        shape: (out, in); (vocabulary, width) for an embedding.
        structure: "dense", "lowrank", "pivoted", "neurons", "heads", "sliced", "removed" or a family's name; "shared
            lowrank" and the like where layers have one factor together, whose numbers are counted with its owner;
            with "int4" for codes of 4 bits, "int4" alone for dense ones.
        rank: rank of the weight (full for dense), or how much there is of another structure.
        numbers: numbers stored, bias and codes included.
        dense_numbers: the same before compression.
        nbytes: bytes stored, index tensors included.
        loss: predicted increase of the loss, in the plan's unit.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    structure: str
    rank: int
    numbers: int
    dense_numbers: int
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Spent:
    """A budget over something else than parameters, and what the plan makes of it.

    Attributes:
        limit: what was asked for, in words: "bytes 20,000,000", "latency 0.7x".
        unit: "bytes", "operations" or "microseconds"; the latter two of the linear layers, for one token.
        before: the dense model's.
        after: the plan's.
    """

    limit: str
    unit: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class SizePlan:
    """One of the sizes of an elastic folder.

    Attributes:
        keep: share of the parameters asked for.
        parameters: floating parameters at that size.
        nbytes: their bytes once cut, index tensors included.
        loss: predicted increase of the loss.
    """

    keep: float
    parameters: int
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What every layer becomes under a budget.

    Attributes:
        method: name of the method.
        keep: share of the whole model's parameters asked for; None under another budget.
        parameters_before: floating parameters of the model, tied ones once.
        parameters_after: the same after compression.
        bytes_before: bytes of those parameters as stored.
        bytes_after: the same after compression, index tensors included.
        unit: what the predicted losses are measured in.
        layers: every layer that was considered, dense ones included, in the model's order.
        spent: the budget, if it is over something else than parameters.
        sizes: of an elastic folder, those its components would be fitted at, ascending; the plan is that of the last.
        components: bytes that these components would take, beside the largest size.
    """

    method: str
    keep: float | None
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    unit: str
    layers: tuple[LayerPlan, ...]
    spent: Spent | None = None
    sizes: tuple[SizePlan, ...] = ()
    components: int = 0

    @property
    def loss(self) -> float:
        """Predicted increase of the loss, all layers together."""
        return sum(layer.loss for layer in self.layers)

    @property
    def kept(self) -> float:
        """Share of the parameters that remains."""
        return self.parameters_after / self.parameters_before

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values = {**asdict(self), "loss": self.loss, "kept": self.kept}
        return values if self.sizes else {k: v for k, v in values.items() if k not in ("sizes", "components")}


@dataclass(frozen=True, slots=True)
class Measured:
    """A loss measured on calibration samples that the fits did not see.

    Attributes:
        name: "loss" (nats per token) or "distance" (mean squared distance of sentence embeddings from the original's).
        before: of the original model.
        after: of the compressed model, with its rounded weights.
        tokens: how many it was measured on.
        held_out: False if the text was too short, and the calibration samples themselves were used.
    """

    name: str
    before: float
    after: float
    tokens: int
    held_out: bool


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second at batch 1, medians of one run in which both models took turns.

    Attributes:
        dense: of the original model.
        compressed: of the compressed one.
    """

    dense: float
    compressed: float


@dataclass(frozen=True, slots=True)
class Checked:
    """What a fresh process found when it loaded the folder.

    Attributes:
        what: what was compared with the compressed model in memory, "logits" or "hidden states".
        difference: largest difference, as a share of the largest magnitude.
        tolerance: the most that was allowed.
        tokens: how many were read for that.
        nbytes: bytes of its parameters, as the plan says.
        speeds: "reading" and, for decoders, "generating".
    """

    what: str
    difference: float
    tolerance: float
    tokens: int
    nbytes: int
    speeds: dict[str, Speed]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a compression run did.

    Attributes:
        plan: what every layer became; ranks and numbers as stored.
        out: the folder written.
        measured: loss before and after; None if a data-free method ran without text.
        seconds: wall time.
        peak_memory: largest resident memory of the process, bytes.
        settings: everything that decided the result, for the model card.
        checked: what a fresh process found; None without a check.
    """

    plan: Plan
    out: Path
    measured: Measured | None
    seconds: float
    peak_memory: int
    settings: dict[str, Any]
    checked: Checked | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "out": str(self.out),
            "measured": asdict(self.measured) if self.measured else None,
            "seconds": round(self.seconds, 3),
            "peak_memory": self.peak_memory,
            "settings": self.settings,
            "checked": asdict(self.checked) if self.checked else None,
            "plan": self.plan.as_dict(),
        }
