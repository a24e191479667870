"""Which blocks skip how many channels, and the predictors by which each batch decides which ones."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts import AdaptedHost, Heads, Neurons, adaptable_layers, channels_of, map_of, offset_of
from eckart.hosts.contextual import Choice, HeadChoice, LossTokens, LowRankPredictor, Sliced, UnitChoice, skeleton
from eckart.linalg import truncated_svd

# Allowed relative excess of the error of a predictor over that of the best one of its rank.
ACCURACY = 1e-3

Set = TypeVar("Set", Neurons, Heads)


@dataclass(frozen=True, slots=True)
class Skipping:
    """How many channels a frozen base skips in training.

    Attributes:
        rank: of the predictors.
        units: share of the hidden units of an MLP that is skipped; 0 for none.
        heads: share of the channels of queries, keys and values.
        units_from: share of the MLPs, from the first on, that skip nothing.
        heads_from: the same of the attentions.
        until: MLPs and attentions behind this share skip nothing.
        dense: passes of training that skip nothing.
        outputs: whether tokens that the loss is taken at skip channels as well.
    """

    rank: int
    units: float
    heads: float
    units_from: float
    heads_from: float
    until: float
    dense: int
    outputs: bool

    def __post_init__(self) -> None:
        for name in ("units", "heads"):
            if not 0 <= getattr(self, name) < 1:
                raise EckartError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("units_from", "heads_from", "until"):
            if not 0 <= getattr(self, name) <= 1:
                raise EckartError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.dense < 0:
            raise EckartError(f"dense must be at least 0, got {self.dense}")


@torch.no_grad()
def shortcuts(model: nn.Module, layers: Collection[str], skipping: Skipping, seed: int) -> dict[str, Sliced]:
    """Return how layers skip channels, by name; those that compute all of them are left out.

    Args:
        model: the model.
        layers: names of the layers an adapter goes on; channels are skipped where all layers around them are among
            these, and are not called by another module than their MLP or attention.
        skipping: how many.
        seed: seed of the decompositions.

    Raises:
        EckartError: if nothing could be skipped.
    """
    found = channels_of(model)
    mlps = [each for each in found if isinstance(each, Neurons) and _owner(model, each) is not None]
    attentions = [each for each in found if isinstance(each, Heads)]
    whole = None if skipping.outputs else LossTokens()
    made: list[tuple[Neurons | Heads, Choice]] = []
    for each in _between(mlps, skipping.units_from, skipping.until if skipping.units else 0.0):
        if _adapted(each, layers):
            made.append((each, _unit_choice(model, each, skipping, seed, whole)))
    for heads in _between(attentions, skipping.heads_from, skipping.until if skipping.heads else 0.0):
        if _adapted(heads, layers):
            made.append((heads, _head_choice(model, heads, skipping, seed, whole)))
    if not made:
        raise EckartError(
            "there are no channels to skip: among the blocks chosen, no MLP or attention has dense layers that are "
            "all adapted; adapt all of them, choose other blocks, or use lora"
        )
    return {name: Sliced(name, choice) for each, choice in made for name in (*each.into, each.out_of)}


def _adapted(found: Neurons | Heads, layers: Collection[str]) -> bool:
    return {*found.into, found.out_of} <= set(layers)


def _between(found: Sequence[Set], start: float, end: float) -> Sequence[Set]:
    """Return those of a sequence between two shares of it."""
    return found[round(start * len(found)) : round(end * len(found))]


def _owner(model: nn.Module, mlp: Neurons) -> str | None:
    """Return the name of the module that holds the layers of an MLP and nothing else to learn, None if none does."""
    owner = mlp.out_of.rpartition(".")[0]
    inside = adaptable_layers(model.get_submodule(owner))
    others = [
        name
        for name, _ in model.get_submodule(owner).named_parameters()
        if not any(name.startswith(f"{layer}.") for layer in inside)
    ]
    return owner if {f"{owner}.{name}" for name in inside} == {*mlp.into, mlp.out_of} and not others else None


def _unit_choice(model: nn.Module, mlp: Neurons, skipping: Skipping, seed: int, whole: LossTokens | None) -> Choice:
    owner = f"{_owner(model, mlp)}."
    predictors = {name.removeprefix(owner): _predictor(*_parts(model, name), skipping, seed) for name in mlp.into}
    predict = skeleton(model.get_submodule(owner[:-1]), predictors, mlp.out_of.removeprefix(owner))
    count = _parts(model, mlp.out_of)[0].shape[1]
    return UnitChoice(mlp.into, mlp.out_of, predict, _kept(count, skipping.units), skipping.dense, whole)


def _head_choice(model: nn.Module, heads: Heads, skipping: Skipping, seed: int, whole: LossTokens | None) -> Choice:
    parts = [_parts(model, name) for name in heads.into]
    if len(parts) == 1:  # one layer holds the rows of all three
        weight, bias = parts[0]
        biases = [None] * 3 if bias is None else bias.split(heads.rows)
        parts = list(zip(weight.split(heads.rows), biases, strict=True))
    predict = [_predictor(weight, bias, skipping, seed) for weight, bias in parts]
    return HeadChoice(heads, predict, _kept(heads.rows[1], skipping.heads), skipping.dense, whole)


def _parts(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer as it was before any adapter."""
    layer = model.get_submodule(name)
    base = layer.base if isinstance(layer, AdaptedHost) else layer
    bias = offset_of(base)
    return map_of(base).dense(), None if bias is None else bias.detach().clone()


def _predictor(weight: Tensor, bias: Tensor | None, skipping: Skipping, seed: int) -> LowRankPredictor:
    """Return the best approximation of a layer of a low rank."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    found = truncated_svd(wide, min(skipping.rank, *weight.shape), accuracy=ACCURACY, seed=seed)
    return LowRankPredictor((found.left * found.values).to(weight.dtype), found.right.to(weight.dtype), bias)


def _kept(count: int, skipped: float) -> int:
    return max(1, int(count * (1 - skipped)))
