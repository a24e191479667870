"""What each layer may become: a list of options with their cost and predicted loss, "leave dense" always among them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from eckart.errors import EckartError

DENSE = "dense"


class Sized(Protocol):
    """A structure of which a layer can have more or less: a storage of low-rank maps, or a fitted family.

    The amount is called rank, whatever it counts.
    """

    @property
    def name(self) -> str:
        """What the structure is called."""

    @property
    def numbers(self) -> Callable[[tuple[int, int], int], int]:
        """(shape, rank) -> floating numbers stored."""

    @property
    def index_bytes(self) -> Callable[[tuple[int, int], int], int]:
        """(shape, rank) -> bytes of index tensors."""

    def largest(self, shape: tuple[int, int]) -> int:
        """Return the largest rank there is."""


@dataclass(frozen=True, slots=True)
class Option:
    """One thing a layer may become.

    Attributes:
        structure: "dense", or the name of a storage ("lowrank", "pivoted") or fitted family ("dictionary").
        rank: rank of the weight (full for dense), or how much there is of another structure.
        numbers: floating numbers stored, bias included.
        nbytes: bytes stored, index tensors included.
        loss: predicted increase of the loss, or the score a threshold is applied to; 0 for dense.
        flops: multiplications and additions for one input vector; None if nobody counted them.
        seconds: time for one input vector; None if nobody measured it.
    """

    structure: str
    rank: int
    numbers: int
    nbytes: int
    loss: float
    flops: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """What a budget counts.

    Attributes:
        name: the field of an `Option` that is counted.
        unit: what it is called in words.
        scale: how many units one of that field is.
    """

    name: Literal["numbers", "nbytes", "flops", "seconds"]
    unit: str
    scale: float = 1.0

    def of(self, option: Option) -> float:
        """Return what an option costs.

        Raises:
            EckartError: if that was neither counted nor measured.
        """
        value: float | None = getattr(option, self.name)
        if value is None:
            raise EckartError(f"a budget over {self.name} needs options that know theirs; {option} does not")
        return value

    def show(self, value: float) -> str:
        """Return a cost in words: "1,234 bytes"."""
        return f"{value * self.scale:,.0f} {self.unit}"


NUMBERS = Measure("numbers", "parameters")
BYTES = Measure("nbytes", "bytes")
FLOPS = Measure("flops", "operations")
SECONDS = Measure("seconds", "microseconds", 1e6)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The options of one layer, by ascending cost, the last one dense.

    Attributes:
        name: the layer.
        shape: (out, in).
        options: at least the dense one.
        curve: loss or score of rank 0, 1, ..., up to full rank, those that save nothing included; empty if unknown.
    """

    name: str
    shape: tuple[int, int]
    options: tuple[Option, ...]
    curve: tuple[float, ...] = ()

    @property
    def dense(self) -> Option:
        """The option that changes nothing."""
        return self.options[-1]

    def by(self, measure: Measure) -> "Candidates":
        """Return the candidates by ascending cost in a measure, without those that cost as much as dense or more."""
        cheaper = [o for o in self.options[:-1] if measure.of(o) < measure.of(self.dense)]
        cheaper.sort(key=lambda o: (measure.of(o), o.loss))
        return replace(self, options=(*cheaper, self.dense))

    def scaled(self, factor: float) -> "Candidates":
        """Return the candidates with every predicted loss multiplied."""
        return replace(self, options=tuple(replace(o, loss=o.loss * factor) for o in self.options))


def candidates(
    name: str,
    shape: tuple[int, int],
    losses: Tensor | Sequence[float],
    stored: Sized,
    *,
    itemsize: int,
    bias: int = 0,
    extra_bias: bool = False,
    round_to: int = 1,
    smallest: int = 1,
) -> Candidates:
    """List the ranks of one layer that take fewer numbers and bytes than it does densely, and the dense layer.

    Args:
        name: the layer.
        shape: (m, n).
        losses: predicted loss of rank 0, 1, ..., as far as ranks are offered.
        stored: what a rank takes.
        itemsize: bytes per number.
        bias: numbers in the layer's own bias.
        extra_bias: whether a compressed layer gains a bias it did not have (m numbers).
        round_to: ranks are multiples of this.
        smallest: smallest rank offered.
    """
    m, n = shape
    dense = m * n + bias
    own = bias or (m if extra_bias else 0)
    values = losses.tolist() if isinstance(losses, Tensor) else list(losses)
    options = []
    for rank in range(
        _multiple_above(max(smallest, 1), round_to), min(stored.largest(shape), len(values) - 1) + 1, round_to
    ):
        numbers = stored.numbers(shape, rank) + own
        if numbers >= dense:
            break
        nbytes = numbers * itemsize + stored.index_bytes(shape, rank)
        if nbytes < dense * itemsize:
            options.append(Option(stored.name, rank, numbers, nbytes, float(values[rank])))
    options.append(Option(DENSE, min(m, n), dense, dense * itemsize, 0.0))
    return Candidates(name, shape, tuple(options), tuple(values) if len(values) > min(shape) else ())


def _multiple_above(value: int, step: int) -> int:
    return -(-value // step) * step


def least_cost(layers: Iterable[Candidates], measure: Measure = NUMBERS) -> float:
    """Return what the cheapest choice for every layer costs together."""
    return sum(measure.of(layer.options[0]) for layer in layers)


def require_reachable(layers: Sequence[Candidates], budget: float, measure: Measure) -> None:
    """Raise an `EckartError` if even the cheapest options together exceed the budget."""
    least = least_cost(layers, measure)
    if least > budget:
        raise EckartError(
            f"the layers' cheapest options take {measure.show(least)} together, but the budget leaves them "
            f"{measure.show(budget)}"
        )
