"""First and second moments of a layer's inputs, accumulated batch by batch.

Legend: x (..., n) a batch of vectors; the sums run over all of them. Products are formed in float32 and added up in
float64 (float32 above 4096 channels, where float64 would double hundreds of megabytes).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg import add_upper_gram, all_finite, mirror_upper

WIDE_ACCUMULATION = 4096


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of the inputs of a group of layers.

    Attributes:
        count: number of vectors seen.
        mean: E[x], (n,).
        mean_abs: E|x|, (n,).
        second: E[x x^T], (n, n).
    """

    count: int
    mean: Tensor
    mean_abs: Tensor
    second: Tensor

    @property
    def norms(self) -> Tensor:
        """Euclidean length of every channel over all vectors, (n,): sqrt(count E[x_j^2])."""
        return (self.second.diagonal().clamp_min(0) * self.count).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields as tensors, for saving."""
        count = torch.tensor(self.count, dtype=torch.int64)
        return {"count": count, "mean": self.mean, "mean_abs": self.mean_abs, "second": self.second}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> "Moments":
        """Rebuild from `tensors()`."""
        return Moments(int(tensors["count"]), tensors["mean"], tensors["mean_abs"], tensors["second"])


class MomentSum:
    """Accumulates the moments of vectors of one size."""

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        dtype = torch.float64 if size <= WIDE_ACCUMULATION else torch.float32
        self.count = 0
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._abs = torch.zeros(size, dtype=torch.float64, device=device)
        self._second = torch.zeros(size, size, dtype=dtype, device=device)

    def add(self, x: Tensor) -> None:
        """Add vectors x (..., n)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.count += rows.shape[0]
        self._sum += rows.sum(0, dtype=torch.float64)
        self._abs += rows.abs().sum(0, dtype=torch.float64)
        add_upper_gram(self._second, rows)

    def add_sum(self, other: "MomentSum") -> None:
        """Add the vectors that another sum has seen."""
        self.count += other.count
        self._sum += other._sum
        self._abs += other._abs
        self._second += other._second

    def result(self, name: str) -> Moments:
        """Return the moments of everything added; the sum is used up by it.

        Raises:
            EckartError: if nothing was added, or NaN or Inf appeared; `name` says where.
        """
        if self.count == 0:
            raise EckartError(f"no inputs reached {name}: the calibration texts never use it")
        # In place: of wide layers these are the largest tensors there are.
        second = mirror_upper(self._second).div_(self.count)
        if not all_finite(second):
            raise EckartError(
                f"the inputs of {name} hold NaN or Inf; check the weights before it and the calibration texts"
            )
        return Moments(self.count, self._sum / self.count, self._abs / self.count, second)


@dataclass(frozen=True, slots=True)
class CrossMoments:
    """Moments of a layer's inputs in the compressed model, and jointly with those in the original one.

    Attributes:
        shifted: of x^, the input inside the compressed model.
        original: of x, the input in the original model; None where only x^ was followed.
        cross: E[x x^^T], (n, n), given with `original`.
    """

    shifted: Moments
    original: Moments | None = None
    cross: Tensor | None = None


class CrossSum:
    """Accumulates what fits on shifted inputs need: moments of x^, and if paired those of x and E[x x^^T]."""

    def __init__(self, size: int, device: torch.device | None = None, *, paired: bool = True) -> None:
        dtype = torch.float64 if size <= WIDE_ACCUMULATION else torch.float32
        self._shifted = MomentSum(size, device)
        self._original = MomentSum(size, device) if paired else None
        self._cross = torch.zeros(size, size, dtype=dtype, device=device) if paired else None

    def add(self, shifted: Tensor, original: Tensor | None = None) -> None:
        """Add vectors (..., n) in the compressed model and, if paired, the same in the original one."""
        self._shifted.add(shifted)
        if self._original is not None and self._cross is not None and original is not None:
            self._original.add(original)
            rows, hats = (t.detach().reshape(-1, t.shape[-1]).float() for t in (original, shifted))
            self._cross += rows.mT @ hats

    @staticmethod
    def merged(parts: Sequence["CrossSum"]) -> "CrossSum":
        """Return the sum over everything that any of some sums, all paired or none, has seen; they stay as they are."""
        second = parts[0]._shifted._second
        out = CrossSum(second.shape[0], second.device, paired=parts[0]._original is not None)
        for part in parts:
            out._shifted.add_sum(part._shifted)
            if out._original is not None and part._original is not None:
                out._original.add_sum(part._original)
            if out._cross is not None and part._cross is not None:
                out._cross += part._cross
        return out

    def result(self, name: str) -> CrossMoments:
        """Return the moments of everything added; the sum is used up by it.

        Raises:
            EckartError: if nothing was added, or NaN or Inf appeared; `name` says where.
        """
        shifted = self._shifted.result(name)
        if self._original is None or self._cross is None:
            return CrossMoments(shifted)
        return CrossMoments(shifted, self._original.result(name), self._cross.div_(shifted.count))


@dataclass(frozen=True, slots=True)
class Gradients:
    """Moments of the loss gradient at the output of one layer.

    Attributes:
        count: number of output vectors seen.
        second: E[g g^T] over vectors, (m, m); g is the gradient of the summed loss of the vector's sequence.
        row_fisher: per output channel, the mean over sequences of sum_j (dL/dW_ij)^2, (m,).
    """

    count: int
    second: Tensor
    row_fisher: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields as tensors, for saving."""
        count = torch.tensor(self.count, dtype=torch.int64)
        return {"count": count, "second": self.second, "row_fisher": self.row_fisher}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> "Gradients":
        """Rebuild from `tensors()`."""
        return Gradients(int(tensors["count"]), tensors["second"], tensors["row_fisher"])


class WeightGradientSum:
    """Accumulates the gradient of the mean loss with respect to the weight of one layer."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add a batch: layer inputs x (..., n) and output gradients (..., m)."""
        inputs, rows = (t.detach().reshape(-1, t.shape[-1]).float() for t in (x, gradient))
        self.count += len(rows)
        self._sum = rows.mT @ inputs if self._sum is None else self._sum.addmm_(rows.mT, inputs)

    def result(self, name: str) -> Tensor:
        """Return E[g x^T] over vectors, (m, n) float32; the sum is used up by it.

        Raises:
            EckartError: if nothing was added; `name` says where.
        """
        if self._sum is None:
            raise EckartError(f"no gradients reached {name}: the loss does not depend on it")
        return self._sum.div_(self.count)


class GradientSum:
    """Accumulates the gradient moments of one layer.

    Args:
        size: m, its outputs.
        device: where to.
        inputs: n, if the mean gradient of the weight is wanted as well.
    """

    def __init__(self, size: int, device: torch.device | None = None, inputs: int | None = None) -> None:
        dtype = torch.float64 if size <= WIDE_ACCUMULATION else torch.float32
        self.count = self.sequences = 0
        self._second = torch.zeros(size, size, dtype=dtype, device=device)
        self._fisher = torch.zeros(size, dtype=torch.float64, device=device)
        self._weight = None if inputs is None else torch.zeros(size, inputs, dtype=torch.float32, device=device)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add a batch: layer inputs x (b, t, n) and output gradients (b, t, m)."""
        gradient = gradient.detach().float()
        rows = gradient.reshape(-1, gradient.shape[-1])
        self.count += rows.shape[0]
        add_upper_gram(self._second, rows)
        for sequence, inputs in zip(gradient, x.detach().float(), strict=True):
            of_weight = sequence.mT @ inputs
            self._fisher += of_weight.square().sum(1, dtype=torch.float64)
            if self._weight is not None:
                self._weight += of_weight
        self.sequences += gradient.shape[0]

    def result(self, name: str) -> Gradients:
        """Return the moments of everything added, using up the sum; `name` says where, if NaN or Inf appeared."""
        second, fisher = mirror_upper(self._second).div_(max(self.count, 1)), self._fisher.div_(max(self.sequences, 1))
        if not all_finite(second) or not all_finite(fisher):
            raise EckartError(f"the gradients at {name} hold NaN or Inf; check the weights and the calibration texts")
        return Gradients(self.count, second, fisher)

    def of_weight(self) -> Tensor:
        """Return the gradient of the mean loss with respect to the weight, E[g x^T] over vectors, (m, n) float32.

        Raises:
            EckartError: if it was not asked for.
        """
        if self._weight is None:
            raise EckartError("the gradient of a weight is only accumulated if the size of its inputs is given")
        return self._weight / max(self.count, 1)
