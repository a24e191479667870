"""Families of maps that a layer can be fitted to, each at any size: what a budget chooses among.

A family says what a size takes and how it is fitted under a metric; low-rank maps, whose errors are known for all
ranks at once, come from the regression instead (fit/regression.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eckart.fit.dictionary import Learner, dictionary_fitter, keep_largest
from eckart.fit.kronecker import fit_kronecker
from eckart.fit.metric import Metric
from eckart.fit.pruned import improve_entries, pruner
from eckart.fit.sparse_plus_lowrank import fit_sparse_plus_lowrank
from eckart.maps import Dense, Kronecker, LinearMap, Product, Sum, bitmap, n_of_m, random_lowrank

# Shares of a layer's dense numbers at which a family is offered where its error has to be measured by fitting it.
SHARES = (0.1, 0.16, 0.22, 0.28, 0.34, 0.4, 0.46, 0.52, 0.58, 0.64, 0.7, 0.76, 0.82, 0.88, 0.94)


@dataclass(frozen=True, slots=True)
class Family:
    """One family of structured maps.

    Attributes:
        name: as plans and reports show it.
        numbers: (shape, size) -> floating numbers stored; rises with the size.
        index_bytes: (shape, size) -> bytes of index tensors.
        largest: (shape) -> the largest size.
        fitter: (W (m, n), metric) -> what gives the fitted map, float64, at any size.
        example: (shape, size, device) -> a map of that size with random numbers, for what depends on sizes alone.
        finish: (W, metric, map) -> a better map of the same size, where that takes too long to compare sizes by.
        code_bytes: where numbers are codes, (shape, size, bytes per scale) -> the most bytes stored in all.
        offered: the sizes offered, where they are not those nearest to `SHARES`.
        codable: whether `coded` (fit/coded.py) can store its numbers as codes.
    """

    name: str
    numbers: Callable[[tuple[int, int], int], int]
    index_bytes: Callable[[tuple[int, int], int], int]
    largest: Callable[[tuple[int, int]], int]
    fitter: Callable[[Tensor, Metric], Callable[[int], LinearMap]]
    example: Callable[[tuple[int, int], int, torch.device], LinearMap]
    finish: Callable[[Tensor, Metric, LinearMap], LinearMap] | None = None
    code_bytes: Callable[[tuple[int, int], int, int], int] | None = None
    offered: tuple[int, ...] = ()
    codable: bool = True

    def fit(self, weight: Tensor, metric: Metric, size: int) -> LinearMap:
        """Return the map fitted to W (m, n) at a size, float64."""
        map_ = self.fitter(weight, metric)(size)
        return map_ if self.finish is None else self.finish(weight, metric, map_)

    def nbytes(self, shape: tuple[int, int], size: int, itemsize: int) -> int:
        """Return the bytes stored at a size, given those of a number."""
        if self.code_bytes is not None:
            return self.code_bytes(shape, size, itemsize)
        return self.numbers(shape, size) * itemsize + self.index_bytes(shape, size)

    def size_within(self, shape: tuple[int, int], numbers: float) -> int:
        """Return the largest size that stores at most that many numbers, 0 if none does."""
        low, high = 0, self.largest(shape)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.numbers(shape, middle) <= numbers else (low, middle - 1)
        return low

    def sizes(self, shape: tuple[int, int]) -> list[int]:
        """Return the sizes offered where each has to be fitted to know its error, ascending."""
        if self.offered:
            return list(self.offered)
        found = {self.size_within(shape, share * math.prod(shape)) for share in SHARES}
        return sorted(found - {0})


def fitter_of(
    fit: Callable[[Tensor, Metric, int], LinearMap],
) -> Callable[[Tensor, Metric], Callable[[int], LinearMap]]:
    """Return the fitter of a family whose sizes have nothing in common."""
    return lambda weight, metric: partial(fit, weight, metric)


def dictionary_family(learner: Learner, ratio: float = 2.0, name: str = "dictionary") -> Family:
    """Return the family of sparse codes times a dictionary: at size t, k = t atoms and s = t / ratio codes per row.

    Once there are as many atoms as the rows have coordinates, only s goes on growing, one per size.

    Args:
        learner: how codes are found.
        ratio: k / s, atoms per non-zero, at least 1.
        name: as plans show it.
    """

    def split(shape: tuple[int, int], size: int) -> tuple[int, int]:
        atoms = min(size, shape[1])
        return atoms, min(max(1, round(atoms / ratio)) + size - atoms, atoms)

    def numbers(shape: tuple[int, int], size: int) -> int:
        atoms, nonzeros = split(shape, size)
        return atoms * shape[1] + nonzeros * shape[0]

    def index_bytes(shape: tuple[int, int], size: int) -> int:
        return shape[0] * -(-split(shape, size)[0] // 8)

    def largest(shape: tuple[int, int]) -> int:
        return 2 * shape[1] - max(1, round(shape[1] / ratio))

    def fitter(weight: Tensor, metric: Metric) -> Callable[[int], LinearMap]:
        fit, shape = dictionary_fitter(weight, metric, learner), (weight.shape[0], weight.shape[1])
        return lambda size: fit(*split(shape, size))

    def example(shape: tuple[int, int], size: int, device: torch.device) -> LinearMap:
        atoms, nonzeros = split(shape, size)
        codes = bitmap(torch.randn(shape[0], atoms, device=device), nonzeros)
        return Product((codes, Dense(torch.randn(atoms, shape[1], device=device))))

    return Family(name, numbers, index_bytes, largest, fitter, example)


def sparse_family(name: str = "sparse") -> Family:
    """Return the family of matrices with s entries in every row, at size s.

    Args:
        name: as plans show it.
    """

    def fitter(weight: Tensor, metric: Metric) -> Callable[[int], LinearMap]:
        prune = pruner(weight, metric)
        return lambda size: bitmap(prune(lambda matrix: keep_largest(matrix, size)), size)

    return Family(
        name,
        lambda shape, size: size * shape[0],
        lambda shape, size: shape[0] * -(-shape[1] // 8),
        lambda shape: shape[1],
        fitter,
        lambda shape, size, device: bitmap(torch.randn(shape, device=device), size),
        finish=improve_entries,
    )


def n_of_m_family(period: int) -> Family:
    """Return the family of N entries in every M of a row, at size N, as the sparse units of GPUs want.

    Args:
        period: M, at most 256; rows that it does not divide are not offered any.
    """

    def largest(shape: tuple[int, int]) -> int:
        return 0 if shape[1] % period else period

    def numbers(shape: tuple[int, int], size: int) -> int:
        return shape[0] * shape[1] // period * size

    def fitter(weight: Tensor, metric: Metric) -> Callable[[int], LinearMap]:
        prune = pruner(weight, metric)
        return lambda size: n_of_m(prune(lambda matrix: n_of_m(matrix, size, period).dense()), size, period)

    def example(shape: tuple[int, int], size: int, device: torch.device) -> LinearMap:
        return n_of_m(torch.randn(shape, device=device), size, period)

    return Family(f"N:{period}", numbers, numbers, largest, fitter, example, finish=improve_entries, codable=False)


def kronecker_family(name: str = "kronecker") -> Family:
    """Return the family of sums of r Kronecker products, at size r.

    Factors are near square: of the shapes whose left one has about the root of the rows, that of fewest numbers.

    Args:
        name: as plans show it.
    """

    def left(shape: tuple[int, int]) -> tuple[int, int]:
        m, n = shape
        rows = next(d for d in range(math.isqrt(m), 0, -1) if m % d == 0)
        columns = (d for d in range(1, n + 1) if n % d == 0)
        return rows, min(columns, key=lambda d: rows * d + (m // rows) * (n // d))

    def right(shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] // left(shape)[0], shape[1] // left(shape)[1]

    def numbers(shape: tuple[int, int], size: int) -> int:
        return size * (math.prod(left(shape)) + math.prod(right(shape)))

    def fit(weight: Tensor, metric: Metric, size: int) -> LinearMap:
        return fit_kronecker(weight, metric, left((weight.shape[0], weight.shape[1])), size)

    def example(shape: tuple[int, int], size: int, device: torch.device) -> LinearMap:
        return Kronecker(*(torch.randn(size, *side(shape), device=device) for side in (left, right)))

    return Family(
        name,
        numbers,
        lambda shape, size: 0,
        lambda shape: min(math.prod(left(shape)), math.prod(right(shape))),
        fitter_of(fit),
        example,
        codable=False,
    )


def sparse_plus_lowrank_family(share: float = 0.25, iterations: int = 80, name: str = "sparse + lowrank") -> Family:
    """Return the family of a low-rank map plus s entries of every row, at size s, the rank rising with them.

    Args:
        share: how much of the numbers is low rank, in [0, 1).
        iterations: rounds of truncating and thresholding.
        name: as plans show it.
    """

    def rank(shape: tuple[int, int], size: int) -> int:
        m, n = shape
        return min(int(share / (1 - share) * m * size / (m + n)), m, n)

    def numbers(shape: tuple[int, int], size: int) -> int:
        return rank(shape, size) * sum(shape) + size * shape[0]

    def fit(weight: Tensor, metric: Metric, size: int) -> LinearMap:
        shape = weight.shape[0], weight.shape[1]
        return fit_sparse_plus_lowrank(weight, metric, rank(shape, size), size, iterations=iterations)

    def index_bytes(shape: tuple[int, int], size: int) -> int:
        return shape[0] * -(-shape[1] // 8)

    def example(shape: tuple[int, int], size: int, device: torch.device) -> LinearMap:
        entries = bitmap(torch.randn(shape, device=device), size)
        return Sum((random_lowrank(shape, rank(shape, size), device), entries))

    return Family(name, numbers, index_bytes, lambda shape: shape[1], fitter_of(fit), example)
