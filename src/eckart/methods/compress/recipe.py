"""What a compression method says: five answers, kept apart, from which the pipeline does the rest.

Structure (`storage`, `embeddings`, and `bits` for how its numbers are stored), metric (`metric`), budget
(`allocation`), solver (`sequential`, `anchor`, `update`) and what is trained afterwards (`heal`). A method's page
returns a `Recipe` with its paper's answers; any answer can be overridden, which is how unpublished combinations are
made.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit import Coding, Metric, Regression
from eckart.fit import metric as build_metric
from eckart.fit.families import Family
from eckart.fit.quantize import Levels, Rounding
from eckart.fit.widths import widths_family
from eckart.methods.compress.learner import Learner
from eckart.methods.compress.removal import Removal
from eckart.methods.compress.sharing import Sharing
from eckart.stats import CrossMoments, Gradients, Moments

Allocation = Literal[
    "uniform",
    "uniform-rank",
    "threshold",
    "sensitivity",
    "calibrated",
    "knapsack",
    "log-loss",
    "zero-sum",
    "influence",
]
Labels = Literal["sampled", "observed"]
HealKind = Literal["blockwise", "lora"]
StorageName = Literal["lowrank", "pivoted"]
# Share of the parameters that remains if nothing is said.
USUAL_KEEP = 0.6


@dataclass(frozen=True, slots=True)
class LayerData:
    """What is known of one layer when its metric is built; a method reads what its recipe asked for.

    Attributes:
        weight: W (m, n).
        inputs: moments of the original input, if asked for.
        gradients: moments of the output gradient, if asked for.
        cross: moments of the input inside the compressed model; only in the pass of a sequential recipe.
        weight_gradient: mean gradient of the loss with respect to the weight, (m, n), for scores.
    """

    weight: Tensor
    inputs: Moments | None = None
    gradients: Gradients | None = None
    cross: CrossMoments | None = None
    weight_gradient: Tensor | None = None


# Scores of rank 0, 1, ... for an allocation that does not use predicted errors.
Score = Callable[[LayerData, Regression], Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A compression method, ready to run.

    Attributes:
        metric: builds the metric of a layer from its data.
        allocation: "uniform" (one share of numbers), "uniform-rank" (one share of ranks), "threshold" (one threshold on
            `score`), "sensitivity" (one threshold on the loss measured with one layer compressed, at several levels),
            "calibrated" (knapsack on errors scaled by one such measurement per layer), "knapsack" (on predicted loss),
            "log-loss" (shares by the logarithm of each layer's error among those of its type), "zero-sum" (singular
            values dropped so that the changes of the loss in `score` cancel) or "influence" (shares by how far each
            block turns its input).
        storage: of low-rank maps: "lowrank", k (m + n) numbers, or "pivoted", k (m + n - k).
        families: what a linear layer may become instead of a low-rank map; several only with "knapsack".
        mixed: whether low-rank maps stay among the choices beside the families, and maps beside fewer hidden units.
        neurons: whether the layers of an MLP get fewer hidden units instead of maps.
        neurons_for_latency: whether they do under a budget over latency, where narrow dense layers are what saves time.
        heads: whether the layers of an attention get fewer channels per head instead of maps.
        sliced: whether the whole model gets fewer residual coordinates; nothing else is done then.
        removal: how whole blocks are removed; nothing else is done then. None where all stay.
        untie: whether slicing gives a tied head a matrix of its own.
        embeddings: whether token embedding and output head may be compressed as well.
        round_to: ranks are multiples of this.
        uses_inputs: whether the metric reads input moments.
        uses_gradients: whether it reads gradient moments.
        uses_weight_gradients: whether its scores read the mean gradients of the weights.
        labels: labels of the gradients: "sampled" from the model or "observed" in the text.
        output_metric: whether predicted errors are in units of the loss (the metric has a full output moment).
        embedding_shrinkage: share of the isotropic moment in the metric of an embedding's coordinates.
        centred: whether compressed layers get a fitted bias.
        sequential: whether each layer is fitted on the inputs it sees in the already compressed model.
        update: whether the up factor is refitted by least squares on those inputs (SVD-LLM).
        heal: epochs of healing; 0 for none.
        heal_kind: "blockwise", reconstruction of each block after it is compressed, or "lora", low-rank updates of the
            factors on the loss of the whole model after all are.
        heal_rate: its learning rate, per AdamW step.
        heal_rank: of those updates.
        gamma: weight of the depth factor of "calibrated".
        score: scores for "threshold" and "zero-sum".
        floor: share of the break-even rank below which "zero-sum" truncates no layer while others can be.
        corrections: how often the truncated weights take a step towards the original ones, along the gradients of the
            weights, and all are truncated again.
        temperature: of "influence"; the larger, the more even the shares.
        ridge: of the leverage scores that hidden units are kept by, over their mean square.
        sharing: which layers have one right factor together; None where every layer has its own.
        reduces: whether fewer parameters remain; a method that only stores them in fewer bits runs at keep 1.
        widths: bits per number among which every row of every layer may choose under a budget over bytes, instead of
            the families; only where `bits` is 0.
        bits: bits per number of every compressed layer, dense ones among them; 0 to store numbers as they were.
        group_size: numbers that share a scale.
        rounding: "nearest", or "feedback" of errors into what is not rounded yet (GPTQ).
        levels: "uniform", or "learned" per row (any4).
        symmetric: whether scales come without zero points.
        clip: whether scales are searched for instead of covering the extremes.
        scale_rank: if not 0, healing trains which code each weight takes, through divisors of that rank, and nothing
            else (LRQ).
        learner: trains the whole model, if the method does; then "threshold" reads the scores it ends with.
    """

    metric: Callable[[LayerData], Metric]
    allocation: Allocation = "uniform"
    storage: StorageName = "lowrank"
    families: tuple[Family, ...] = ()
    mixed: bool = False
    neurons: bool = False
    neurons_for_latency: bool = False
    heads: bool = False
    sliced: bool = False
    removal: Removal | None = None
    untie: bool = False
    embeddings: bool = False
    round_to: int = 1
    uses_inputs: bool = False
    uses_gradients: bool = False
    uses_weight_gradients: bool = False
    labels: Labels = "observed"
    output_metric: bool = False
    embedding_shrinkage: float = 0.01
    centred: bool = False
    sequential: bool = False
    update: bool = False
    heal: int = 0
    heal_kind: HealKind = "blockwise"
    heal_rate: float = 1e-4
    heal_rank: int = 8
    gamma: float = 0.0
    score: Score | None = None
    sharing: Sharing | None = None
    reduces: bool = True
    widths: tuple[int, ...] = ()
    bits: int = 0
    group_size: int = 128
    rounding: Rounding = "feedback"
    levels: Levels = "uniform"
    symmetric: bool = False
    clip: bool = True
    scale_rank: int = 0
    floor: float = 0.0
    corrections: int = 0
    temperature: float = 0.1
    ridge: float = 1.0
    learner: Learner | None = None

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise EckartError(f"round_to must be at least 1, got {self.round_to}")
        if self.heal < 0:
            raise EckartError(f"heal is a number of epochs and must not be negative, got {self.heal}")
        if not self.heal_rate > 0:
            raise EckartError(f"heal_rate must be positive, got {self.heal_rate}")
        if self.families and self.allocation not in ("uniform", "uniform-rank", "knapsack", "log-loss", "influence"):
            names = ", ".join(family.name for family in self.families)
            raise EckartError(f"allocation={self.allocation} knows low-rank maps only, and this method uses {names}")
        if len(self.families) + self.mixed > 1 and self.allocation != "knapsack":
            raise EckartError(f"allocation={self.allocation} cannot choose among structures; use knapsack")
        if self.families and self.update:
            raise EckartError("update refits low-rank maps only")
        if self.learner is not None:
            self._check_learner(self.learner)
        elif self.allocation == "threshold" and self.score is None:
            raise EckartError("allocation=threshold needs a method that scores spectra, such as welore")
        self._check_coding()
        if self.allocation == "zero-sum" and not self.uses_weight_gradients:
            raise EckartError("allocation=zero-sum needs the gradients of the weights, which zs-svd collects")
        if self.corrections and not self.uses_weight_gradients:
            raise EckartError("corrections need the gradients of the weights, which zs-svd collects")
        if self.uses_weight_gradients and self.embeddings:
            raise EckartError("zero-sum scores know linear layers only; leave embeddings=false")
        self._check_narrowing()
        self._check_healing()
        if self.sharing is not None:
            self._check_sharing()

    def _check_sharing(self) -> None:
        if self.allocation not in ("uniform", "uniform-rank", "knapsack"):
            raise EckartError(f"allocation={self.allocation} looks at one layer at a time, and this method shares")
        if self.sequential or self.update or self.centred or self.output_metric or not self.uses_inputs:
            raise EckartError("layers share a factor under the uncentred moments of their original inputs only")
        if len(self.families) + self.mixed > 1:
            raise EckartError("layers that share a factor are of one structure")

    def _check_narrowing(self) -> None:
        if self.narrows and not self.mixed and self.allocation not in ("uniform", "influence"):
            raise EckartError(f"allocation={self.allocation} does not know hidden units; use uniform or influence")
        if self.together and not self.output_metric:
            raise EckartError("fewer hidden units compare with maps of their layers in units of the loss only")
        if self.heads and (self.mixed or self.sequential or not self.uses_inputs):
            raise EckartError(
                "heads are fitted under the moments of their original inputs, and are no choice beside maps"
            )
        tables = self.embeddings and not self.bits  # codes of them are no other width
        answers = self.allocation, self.storage, tables, self.heal
        if self.plain and answers != ("uniform", "lowrank", False, 0):
            what = "slicing" if self.sliced else "removing blocks"
            raise EckartError(f"{what} changes the whole model at once: leave allocation, storage, embeddings and heal")
        for name in ("temperature", "ridge"):
            if not getattr(self, name) > 0:
                raise EckartError(f"{name} must be positive, got {getattr(self, name)}")

    def _check_healing(self) -> None:
        if self.heal_rank < 1:
            raise EckartError(f"heal_rank must be at least 1, got {self.heal_rank}")
        if self.heals_by_lora and (self.families or self.neurons or self.bits):
            raise EckartError(
                "heal_kind=lora trains the factors of low-rank and pivoted maps, stored as they are; for other "
                "structures and for bits leave heal_kind=blockwise"
            )

    def _check_coding(self) -> None:
        Coding(self.bits or 8, self.group_size)  # refuses what cannot be
        _ = self.codes  # likewise
        rigid = [family.name for family in self.families if not family.codable]
        if self.bits and rigid:
            raise EckartError(f"the numbers of {' and '.join(rigid)} are not stored in codes; leave bits at 0")
        if self.widths and self.allocation != "knapsack":
            raise EckartError(f"allocation={self.allocation} cannot choose among widths of codes; use knapsack")
        if self.scale_rank and self.levels != "uniform":
            raise EckartError("codes are learned for uniform levels only; give levels=uniform")
        if not self.reduces and not self.bits:
            raise EckartError("bits=0 leaves this method nothing to do; give 2, 3, 4, 5, 6 or 8")

    def _check_learner(self, learner: Learner) -> None:
        if self.heal:
            raise EckartError("heal does not go with this method, which trains the whole model; set its own steps")
        known = ("uniform", "uniform-rank", "threshold") if learner.search else ("uniform", "uniform-rank", "knapsack")
        if self.allocation not in known:
            raise EckartError(
                f"allocation={self.allocation} does not go with this method; choose one of {', '.join(known)}"
            )

    @property
    def weighs_tokens(self) -> bool:
        """Whether the rows of an embedding count as much as their tokens occur, without gradients."""
        return self.uses_inputs or (self.learner is not None and self.learner.search is not None)

    def family(self, name: str) -> Family | None:
        """Return the family of that name, None for low-rank maps and dense layers."""
        codes = self.codes
        return next((f for f in (*self.families, *([codes] if codes else [])) if f.name == name), None)

    @property
    def codes(self) -> Family | None:
        """The family of codes whose width differs from row to row; None if the recipe has no `widths` or has `bits`."""
        if not self.widths or self.bits:
            return None
        return widths_family([self._coding(bits) for bits in self.widths])

    @property
    def coding(self) -> Coding | None:
        """How the numbers of compressed layers are stored, or None if as they were."""
        if not self.bits:
            return None
        return self._coding(self.bits)

    def _coding(self, bits: int) -> Coding:
        return Coding(bits, self.group_size, self.rounding, self.levels, self.symmetric, self.clip)

    def under(self, option: str) -> "Recipe":
        """Return the recipe for a budget given by an option: keep, bytes, flops or latency."""
        fits = option == "latency" and not self.bits and self.allocation == "knapsack"
        return replace(self, neurons=True) if self.neurons_for_latency and fits else self

    @property
    def narrows(self) -> bool:
        """Whether some layers become narrower together."""
        return self.neurons or self.heads

    @property
    def together(self) -> bool:
        """Whether fewer hidden units are a choice beside maps of the layers around them."""
        return self.neurons and self.mixed

    @property
    def usual_keep(self) -> float:
        """The share of parameters that remains if nothing else is asked for."""
        return USUAL_KEEP if self.reduces else 1.0

    @property
    def plain(self) -> bool:
        """Whether the result is an ordinary smaller model, without maps."""
        return self.sliced or self.removal is not None

    @property
    def heals_blocks(self) -> bool:
        """Whether every block is healed once it is compressed."""
        return self.heal > 0 and self.heal_kind == "blockwise"

    @property
    def heals_by_lora(self) -> bool:
        """Whether the compressed model is healed as a whole."""
        return self.heal > 0 and self.heal_kind == "lora"

    @property
    def scores(self) -> bool:
        """Whether its allocation compares scores instead of predicted losses."""
        return self.allocation in ("threshold", "zero-sum")

    @property
    def needs_text(self) -> bool:
        """Whether the recipe cannot run without calibration text."""
        measured = self.allocation in ("sensitivity", "calibrated", "log-loss", "influence")
        gradients = self.uses_gradients or self.uses_weight_gradients
        trained = self.heal > 0 or self.learner is not None or self.removal is not None
        return self.uses_inputs or gradients or self.sequential or self.update or trained or measured


# Answers that may be overridden for any method, beside the method's own settings.
COMMON = (
    *("allocation", "storage", "embeddings", "round_to", "gamma"),
    *("heal", "heal_kind", "heal_rate", "heal_rank"),
    *("bits", "group_size", "rounding", "levels", "symmetric", "clip"),
)


def overridden(recipe: Recipe, **answers: object) -> Recipe:
    """Return the recipe with some of its `COMMON` answers replaced.

    Raises:
        EckartError: for an answer that is not one of them.
    """
    for name in answers:
        if name not in COMMON:
            raise EckartError(f"{name!r} is not a setting common to all methods; those are {', '.join(COMMON)}")
    return dataclasses.replace(recipe, **answers)  # type: ignore[arg-type]


def raw_moments(data: LayerData) -> tuple[Tensor, Tensor]:
    """Return (mean, second moment) of the original inputs of a layer whose recipe uses them."""
    if data.inputs is None:
        raise EckartError("this metric needs input moments, which its recipe did not ask for")
    return data.inputs.mean, data.inputs.second


def input_moment(data: LayerData) -> Metric:
    """Return the metric of the layer's output on its original inputs."""
    return build_metric(raw_moments(data)[1])


def joint_moments(cross: CrossMoments) -> tuple[Moments, Tensor]:
    """Return (moments of the original inputs, cross moment with those inside the compressed model)."""
    if cross.original is None or cross.cross is None:
        raise EckartError("this metric needs both inputs of a layer, which its recipe did not ask for")
    return cross.original, cross.cross


def gradient_moment(data: LayerData) -> Tensor:
    """Return the second moment of the output gradients of a layer whose recipe uses them."""
    if data.gradients is None:
        raise EckartError("this metric needs gradient moments, which its recipe did not ask for")
    return data.gradients.second


def check_least(name: str, value: float, least: float) -> None:
    """Raise an `EckartError` if a setting is below its least value."""
    if not value >= least:
        raise EckartError(f"{name} must be at least {least:g}, got {value}")


def check_share(name: str, value: float) -> float:
    """Return a setting that must lie in [0, 1].

    Raises:
        EckartError: if it does not.
    """
    if not 0.0 <= value <= 1.0:
        raise EckartError(f"{name} must lie in [0, 1], got {value}")
    return value


def normalized_spectrum(data: LayerData, regression: Regression) -> Tensor:
    """Score each rank by the largest singular value it drops, min-max normalized over the matrix (WeLore).

    Returns:
        (min(m, n) + 1,) float64: entry k is the normalized sigma_{k+1}; the last entry is 0.
    """
    values = regression.eigen.values.sqrt()
    span = (values[0] - values[-1]).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.cat(((values - values[-1]) / span, values.new_zeros(1)))
