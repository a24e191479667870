"""What a compression method says: five answers, kept apart, from which the pipeline does the rest.

Structure (`storage`, `embeddings`), metric (`metric`), budget (`allocation`), solver (`sequential`, `anchor`, `update`)
and what is trained afterwards (`heal`). A method's page returns a `Recipe` with its paper's answers; any answer can be
overridden, which is how unpublished combinations are made.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit import Metric, Regression
from eckart.fit import metric as build_metric
from eckart.fit.families import Family
from eckart.methods.compress.learner import Learner
from eckart.stats import CrossMoments, Gradients, Moments

Allocation = Literal["uniform", "uniform-rank", "threshold", "sensitivity", "calibrated", "knapsack"]
Labels = Literal["sampled", "observed"]
StorageName = Literal["lowrank", "pivoted"]


@dataclass(frozen=True, slots=True)
class LayerData:
    """What is known of one layer when its metric is built; a method reads what its recipe asked for.

    Attributes:
        weight: W (m, n).
        inputs: moments of the original input, if asked for.
        gradients: moments of the output gradient, if asked for.
        cross: moments of the input inside the compressed model; only in the pass of a sequential recipe.
    """

    weight: Tensor
    inputs: Moments | None = None
    gradients: Gradients | None = None
    cross: CrossMoments | None = None


# Scores of rank 0, 1, ... for an allocation that does not use predicted errors.
Score = Callable[[Tensor, Regression], Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A compression method, ready to run.

    Attributes:
        metric: builds the metric of a layer from its data.
        allocation: "uniform" (one share of numbers), "uniform-rank" (one share of ranks), "threshold" (one threshold on
            `score`), "sensitivity" (one threshold on the loss measured with one layer compressed, at several levels),
            "calibrated" (knapsack on errors scaled by one such measurement per layer) or "knapsack" (on predicted
            loss).
        storage: of low-rank maps: "lowrank", k (m + n) numbers, or "pivoted", k (m + n - k).
        families: what a linear layer may become instead of a low-rank map; several only with "knapsack".
        mixed: whether low-rank maps stay among the choices beside the families.
        embeddings: whether token embedding and output head may be compressed as well.
        round_to: ranks are multiples of this.
        uses_inputs: whether the metric reads input moments.
        uses_gradients: whether it reads gradient moments.
        labels: labels of the gradients: "sampled" from the model or "observed" in the text.
        output_metric: whether predicted errors are in units of the loss (the metric has a full output moment).
        embedding_shrinkage: share of the isotropic moment in the metric of an embedding's coordinates.
        centred: whether compressed layers get a fitted bias.
        sequential: whether each layer is fitted on the inputs it sees in the already compressed model.
        update: whether the up factor is refitted by least squares on those inputs (SVD-LLM).
        heal: epochs of blockwise reconstruction after each block is compressed; 0 for none.
        heal_rate: its learning rate, per AdamW step.
        gamma: weight of the depth factor of "calibrated".
        score: scores for "threshold".
        learner: trains the whole model, if the method does; then "threshold" reads the scores it ends with.
    """

    metric: Callable[[LayerData], Metric]
    allocation: Allocation = "uniform"
    storage: StorageName = "lowrank"
    families: tuple[Family, ...] = ()
    mixed: bool = False
    embeddings: bool = False
    round_to: int = 1
    uses_inputs: bool = False
    uses_gradients: bool = False
    labels: Labels = "observed"
    output_metric: bool = False
    embedding_shrinkage: float = 0.01
    centred: bool = False
    sequential: bool = False
    update: bool = False
    heal: int = 0
    heal_rate: float = 1e-4
    gamma: float = 0.0
    score: Score | None = None
    learner: Learner | None = None

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise EckartError(f"round_to must be at least 1, got {self.round_to}")
        if self.heal < 0:
            raise EckartError(f"heal is a number of epochs and must not be negative, got {self.heal}")
        if not self.heal_rate > 0:
            raise EckartError(f"heal_rate must be positive, got {self.heal_rate}")
        if self.families and self.allocation not in ("uniform", "uniform-rank", "knapsack"):
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

    def _check_learner(self, learner: Learner) -> None:
        if self.embeddings:
            raise EckartError("embeddings=true does not go with this method, which trains linear layers only")
        if self.heal:
            raise EckartError("heal does not go with this method, which trains the whole model; set its own steps")
        known = ("uniform", "uniform-rank", "threshold") if learner.search else ("uniform", "uniform-rank", "knapsack")
        if self.allocation not in known:
            raise EckartError(
                f"allocation={self.allocation} does not go with this method; choose one of {', '.join(known)}"
            )

    def family(self, name: str) -> Family | None:
        """Return the family of that name, None for low-rank maps and dense layers."""
        return next((f for f in self.families if f.name == name), None)

    @property
    def needs_text(self) -> bool:
        """Whether the recipe cannot run without calibration text."""
        measured = self.allocation in ("sensitivity", "calibrated")
        trained = self.heal > 0 or self.learner is not None
        return self.uses_inputs or self.uses_gradients or self.sequential or self.update or trained or measured


# Answers that may be overridden for any method, beside the method's own settings.
COMMON = ("allocation", "storage", "embeddings", "round_to", "heal", "heal_rate", "gamma")


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


def normalized_spectrum(weight: Tensor, regression: Regression) -> Tensor:
    """Score each rank by the largest singular value it drops, min-max normalized over the matrix (WeLore).

    Returns:
        (min(m, n) + 1,) float64: entry k is the normalized sigma_{k+1}; the last entry is 0.
    """
    values = regression.eigen.values.sqrt()
    span = (values[0] - values[-1]).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.cat(((values - values[-1]) / span, values.new_zeros(1)))
