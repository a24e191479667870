"""What a page returns: how a layer's adapter is built, and what training it asks for besides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Change, GradientRule, Plus
from eckart.maps import LinearMap, LowRank
from eckart.methods.adapt.between import Between
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.skipping import Skipping


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method of adaptation with its settings.

    Attributes:
        build: returns the adapter of a layer.
        rate: learning rate of AdamW to start from, where the finder is not asked.
        uses_inputs: whether layers need the moments of their inputs.
        uses_gradients: whether layers need the mean gradient of their weight.
        ranks: chooses the rank of every layer from all of them, or None for one rank everywhere.
        shares: share of the learning rate by a part of a parameter's name.
        rule: what is done to the gradients of trained pairs of factors, or None.
        penalty: what training adds to the loss for each adapter, or None.
        between: what is done between optimizer steps, or None.
        skipping: how many channels the frozen layers skip in training, or None for none.
        server: what the server of a federation makes of a layer's changes and a rank, or None for averaged parameters.
        follows: whether an adapter may build on an earlier one of its method.
    """

    build: Callable[[Layer], Adapter]
    rate: float
    uses_inputs: bool = False
    uses_gradients: bool = False
    ranks: Callable[[Sequence[Layer]], dict[str, int]] | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    rule: GradientRule | None = None
    penalty: Callable[[Adapter], Tensor] | None = None
    between: Between | None = None
    skipping: Skipping | None = None
    server: Callable[[Sequence[LowRank], int], LowRank] | None = None
    follows: bool = False


def check_rank(rank: int) -> None:
    """Raise an `EckartError` unless a rank is positive."""
    if rank < 1:
        raise EckartError(f"rank must be at least 1, got {rank}")


def added(layer: Layer, rank: int, scale: float, *, down: Tensor | None = None, dropout: float = 0.0) -> Plus:
    """Return the change W + s B A with B = 0, which starts at W.

    Args:
        layer: the layer.
        rank: r asked for; a redistribution over layers may have chosen another.
        scale: s.
        down: A (r, n); by default uniform in +-1/sqrt(n), what `nn.Linear` starts from.
        dropout: share of the inputs of A that is dropped in training.
    """
    if down is None:
        down = layer.uniform(layer.fitting(rank), layer.shape[1]) / layer.shape[1] ** 0.5
    up = torch.zeros(layer.shape[0], down.shape[0], device=down.device)
    return Plus(LowRank(up, down), scale, dropout=dropout)


def train_only(change: Change, prefix: str) -> Change:
    """Freeze every parameter of a change whose name does not begin like this, and return the change."""
    for name, parameter in change.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))
    return change


def moved_start(start: LinearMap, scale: float = 1.0) -> Adapter:
    """Return W - s D0 + s D that starts with D = D0: the base keeps its bytes, the shift is a frozen change."""
    copy = start.apply(torch.clone)
    return Adapter([Plus(copy, -scale).requires_grad_(False), Plus(start, scale)])


def root_split(left: Tensor, values: Tensor, right: Tensor, scale: float) -> LowRank:
    """Return B A = left diag(values) right / s with the values shared out evenly."""
    root = (values / scale).clamp_min(0).sqrt()
    return LowRank(left * root, root[:, None] * right)
