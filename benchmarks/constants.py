"""The constants of the cost models, each beside what this machine gives for it over a range of shapes.

    python benchmarks/constants.py [--runs 15]

- GATHER_COST: seconds to reorder one number of 256 vectors, joined first, in multiplications of a dense layer
- EXPAND_TOKENS: the fewest vectors for which spelling out the pivots' identity rows beats reordering
- ROWS_TOKENS: the most vectors for which torch's sparse product of a 2:4 matrix beats writing that matrix out
- SPARSE: not a constant but its reason: seconds of torch's sparse product, at a density of 0.1, over those of writing
  the matrix out and multiplying densely, for 256 vectors
- NUMBERS_PER_CALL: seconds of one more small `nn.Linear` on one vector, in numbers of a dense layer read
- MULTIPLICATIONS_PER_CALL: seconds that a pair of factors loses on 256 vectors against the rate of a dense layer, in
  multiplications of that layer
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.hosts.decoding import MULTIPLICATIONS_PER_CALL, NUMBERS_PER_CALL
from eckart.maps import LowRank, n_of_m, pivot, sparse
from eckart.maps.pivoted import EXPAND_TOKENS, GATHER_COST, multiply_pivoted
from eckart.maps.sparse import ROWS_TOKENS, multiply_compressed_rows
from harness import medians, save

SHAPES = ((192, 192), (512, 192), (1024, 1024), (4096, 1024))
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
MANY = 256


def seconds(contenders: dict[str, Callable[[], Any]], runs: int, repeat: int = 20) -> dict[str, float]:
    """Return median seconds of one call of each."""

    def repeated(function: Callable[[], Any]) -> None:
        for _ in range(repeat):
            function()

    times = medians({name: lambda f=f: repeated(f) for name, f in contenders.items()}, runs=runs)
    return {name: value / repeat for name, value in times.items()}


def gather_cost(m: int, n: int, runs: int) -> float:
    weight, x, order = torch.randn(m, n), torch.randn(MANY, n), torch.randperm(m).int()
    halves = torch.randn(MANY, m // 2), torch.randn(MANY, m - m // 2)
    times = seconds(
        {"dense": lambda: F.linear(x, weight), "gather": lambda: torch.cat(halves, dim=-1).index_select(-1, order)},
        runs,
    )
    return (times["gather"] / (MANY * m)) / (times["dense"] / (MANY * m * n))


def crossover(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], n: int, runs: int) -> int:
    """Return the fewest vectors for which the second way is faster; beyond all tried if it never is."""
    for tokens in TOKENS:
        x = torch.randn(tokens, n)
        times = seconds({"first": lambda x=x: first(x), "second": lambda x=x: second(x)}, runs)
        if times["second"] < times["first"]:
            return tokens
    return 2 * TOKENS[-1]


def expand_tokens(m: int, n: int, runs: int) -> int:
    map_ = pivot(LowRank(torch.randn(m, min(m, n) // 4), torch.randn(min(m, n) // 4, n)))
    parts = map_.basis, map_.coefficients, map_.order, map_.axis

    def spelled_out(x: Tensor) -> Tensor:
        return map_.lowrank()(x)  # anew in every call, as the map does

    return crossover(lambda x: multiply_pivoted(x, *parts), spelled_out, n, runs)


def rows_tokens(m: int, n: int, runs: int) -> int:
    map_ = n_of_m(torch.randn(m, n), 2, 4)
    columns = map_.columns().int().flatten()
    starts = torch.arange(0, columns.numel() + 1, n // 2).int()
    by_rows = sparse_product(map_.values.flatten(), columns, starts)
    return crossover(by_rows, lambda x: F.linear(x, map_.dense()), n, runs) - 1


def sparse_product(values: Tensor, columns: Tensor, starts: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: multiply_compressed_rows(x, values, columns, starts)


def sparse_share(m: int, n: int, runs: int) -> float:
    map_, x = sparse(torch.randn(m, n) * (torch.rand(m, n) < 0.1)), torch.randn(MANY, n)
    times = seconds({"sparse": lambda: map_(x), "written": lambda: F.linear(x, map_.dense())}, runs)
    return times["sparse"] / times["written"]


def numbers_per_call(m: int, n: int, runs: int) -> float:
    x, dense = torch.randn(1, n), nn.Linear(n, m, bias=False)
    y, small = torch.randn(1, 8), nn.Linear(8, 8, bias=False)
    times = seconds({"dense": lambda: dense(x), "call": lambda: small(y)}, runs, repeat=200)
    return times["call"] / max(times["dense"] - times["call"], 1e-9) * m * n


def multiplications_per_call(m: int, n: int, runs: int) -> float:
    rank = int(0.6 * m * n / (m + n))
    x, weight = torch.randn(MANY, n), torch.randn(m, n)
    map_ = LowRank(torch.randn(m, rank), torch.randn(rank, n))
    times = seconds({"dense": lambda: F.linear(x, weight), "factors": lambda: map_(x)}, runs)
    rate = MANY * m * n / times["dense"]
    return max(times["factors"] - MANY * map_.numbers / rate, 0.0) * rate


MEASURED: dict[str, tuple[float, Callable[[int, int, int], float]]] = {
    "GATHER_COST": (GATHER_COST, gather_cost),
    "EXPAND_TOKENS": (EXPAND_TOKENS, expand_tokens),
    "ROWS_TOKENS": (ROWS_TOKENS, rows_tokens),
    "SPARSE": (1.0, sparse_share),
    "NUMBERS_PER_CALL": (NUMBERS_PER_CALL, numbers_per_call),
    "MULTIPLICATIONS_PER_CALL": (MULTIPLICATIONS_PER_CALL, multiplications_per_call),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    rows = []
    with torch.no_grad():
        for name, (used, measure) in MEASURED.items():
            found = {f"{m}x{n}": measure(m, n, runs) for m, n in SHAPES}
            rows.append(
                {"constant": name, "used": used, "median": statistics.median(found.values()), "by shape": found}
            )
            print(rows[-1], flush=True)
    save("constants", rows)


if __name__ == "__main__":
    main()
