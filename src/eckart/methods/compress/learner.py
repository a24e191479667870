"""What a method that trains the whole model says: the layer it trains, what it adds to the loss, how long it trains.

Two runs follow each other. The search trains layers that are still able to be anything, and ends with a score for every
component of every layer; the allocation turns scores and budget into ranks. The tuning trains the chosen structure. A
method may do without either. What both lower is the same for all methods (goal.py): where pages say cross-entropy, an
encoder has its distance from the original.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.fit import Metric, regress
from eckart.maps import LowRank
from eckart.methods.training import Course, Step


class LearnedLayer(nn.Module, ABC):
    """A linear layer (m, n) while its structure is being searched; parameters that require gradients are trained.

    Args:
        shape: (m, n).
        bias: (m,), or None; frozen unless the method trains everything.
    """

    def __init__(self, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        self.shape = shape
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return what the layer becomes if it stays dense, (m, n)."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Return how important the most important component is, the second, ...; (min(m, n),), never ascending."""

    def target(self, rank: int) -> Tensor:
        """Return the matrix (m, n) that the map of a rank is to come close to."""
        return self.matrix()

    def factors(self, rank: int, seen: Metric) -> LowRank:
        """Return the map of a rank, by default the best one under the recipe's metric.

        Args:
            rank: k.
            seen: metric built from the layer's inputs in the trained model.
        """
        return regress(self.target(rank), seen, rank=rank).factors(rank)

    def hold(self, rank: int) -> None:
        """Fix the choice of components to those of a rank, for a tuning that trains what else there is.

        Args:
            rank: k; min(m, n) for a layer that stays dense.
        """
        raise AssertionError("a learner that holds has layers that can be held")


@dataclass(frozen=True, slots=True)
class Learner:
    """A method that trains the whole model.

    Attributes:
        search: the run that finds the structure; None if the recipe's closed form does.
        tuning: the run that trains the structure found; None for none.
        everything: whether all parameters inside the blocks are trained, or only the layers compressed.
        features: weight of the mean relative squared distance between the blocks' outputs and the original's, in both
            runs.
        departure: weight of the mean relative squared distance between the layers' matrices and the original's, in the
            tuning.
        any_size: whether the search does not depend on the budget, so that one serves all of them.
        by_sequence: whether searched layers are projected on what the leading outputs of single sequences have in
            common, instead of fitted under the recipe's metric.
    """

    search: Course | None = None
    tuning: Course | None = None
    everything: bool = False
    features: float = 0.0
    departure: float = 0.0
    any_size: bool = True
    by_sequence: bool = False

    @property
    def windows(self) -> int:
        """Windows of text in which no run sees one twice."""
        return max((c.steps * c.batch for c in (self.search, self.tuning) if c is not None), default=1)

    @property
    def holds(self) -> bool:
        """Whether the tuning trains the layers under search, held at their ranks, instead of the maps they become."""
        return False

    def layer(
        self, weight: Tensor, bias: Tensor | None, share: float, generator: torch.Generator, seen: Metric
    ) -> LearnedLayer:
        """Return a layer to search.

        Args:
            weight: W (m, n), float32.
            bias: (m,), or None.
            share: of the layers' numbers that may remain.
            generator: what is random in it, on the CPU.
            seen: the recipe's metric, built from the layer's inputs in the original model.
        """
        raise AssertionError("a learner without a search has no layers")

    def apart(self, name: str) -> bool:
        """Tell whether the gradient of a layer's parameter is clipped apart from those of the others."""
        return False

    def prepare(self, layers: "Layers", step: Step) -> None:
        """Change the layers before a step of the search."""

    def objective(self, loss: Tensor, layers: "Layers", step: Step) -> Tensor:
        """Return what a step of the search minimises, given the loss."""
        return loss

    def after(self, layers: "Layers", step: Step) -> bool:
        """Change the layers behind a step of the search; return True to end it."""
        return False


# Layers under search by name. `dict` and not `nn.ModuleDict`: names have dots.
Layers = Mapping[str, Any]


def course(steps: int, rate: float, batch: int, **more: float) -> Course | None:
    """Return a course, or None for no steps.

    Raises:
        EckartError: for a number out of range.
    """
    if steps < 0:
        raise EckartError(f"a number of steps must not be negative, got {steps}")
    return Course(steps, rate, batch, **more) if steps else None  # type: ignore[arg-type]


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter that is not trained, hence not part of a run's state."""
    return nn.Parameter(tensor, requires_grad=False)
