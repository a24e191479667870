"""The low-rank fit of one large layer against the SVD of its whitened weight, in one run: time and excess error.

    python benchmarks/solver.py [--runs 3] [--shapes 4096x4096 4096x11008] [--rank 1024]

The weight is random; the input moment has eigenvalues falling like 1/i, as those of real layers do (participation
exponents between 0.5 and 1.5 were measured on the models of the compression table). Contenders:

- eckart: `regress(...).factors(rank)` from the weight and the moment, root of the moment included, excess at most 1e-3
- torch float32: `torch.linalg.svd` of the whitened weight; the whitening itself is not timed
- scikit-learn: `randomized_svd` of the whitened weight with as many power iterations as meet the same excess
"""

import argparse
from typing import Any

import numpy as np
import torch
from sklearn.utils.extmath import randomized_svd

from eckart.fit import Metric, regress
from harness import load, medians, save

ACCURACY = 1e-3


def problem(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weight (m, n), moment G (n, n) and a root L with G = L L^T, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) / n**0.5
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    scales = torch.arange(1, n + 1).pow(-0.5)
    root = basis * scales  # G = Q diag(1/i) Q^T
    return weight, (root @ root.mT), root


def tail(weight: torch.Tensor, approximation: torch.Tensor, root: torch.Tensor) -> float:
    """Return |(W - W') L|_F."""
    return float(torch.linalg.matrix_norm((weight.double() - approximation.double()) @ root.double()))


def sklearn_iterations(whitened: np.ndarray, rank: int, best: float) -> int:
    """Return the smallest number of power iterations whose excess is within `ACCURACY`."""
    for iterations in range(1, 12):
        u, s, v = randomized_svd(whitened, rank, n_oversamples=rank // 4, n_iter=iterations, random_state=0)
        if np.linalg.norm(whitened - (u * s) @ v) <= (1 + ACCURACY) * best:
            return iterations
    return 12


def row(m: int, n: int, rank: int, runs: int) -> dict[str, Any]:
    weight, moment, root = problem(m, n)
    whitened = weight @ root
    array = whitened.numpy()
    singular = torch.linalg.svdvals(whitened.double())
    best = float(singular[rank:].square().sum().sqrt())
    iterations = sklearn_iterations(array, rank, best)
    metric = Metric(inputs=moment)

    def fitted() -> torch.Tensor:
        return regress(weight, metric, rank=rank, accuracy=ACCURACY).factors(rank).dense()

    contenders = {
        "eckart": lambda: regress(weight, metric, rank=rank, accuracy=ACCURACY).factors(rank),
        "torch float32": lambda: torch.linalg.svd(whitened, full_matrices=False),
        "scikit-learn": lambda: randomized_svd(array, rank, n_oversamples=rank // 4, n_iter=iterations, random_state=0),
    }
    times = medians(contenders, runs=runs, warm_up=0)
    return {
        "shape": f"{m}x{n}",
        "rank": rank,
        "method": regress(weight, metric, rank=rank, accuracy=ACCURACY).eigen.method,
        "excess": tail(weight, fitted(), root) / best - 1,
        "seconds": times,
        "ratio": {name: seconds / times["eckart"] for name, seconds in times.items()},
        "scikit-learn iterations": iterations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"])
    given = parser.parse_args()
    rows = load("solver")["rows"]
    for shape in given.shapes:
        m, n = map(int, shape.split("x"))
        rows = [r for r in rows if r["shape"] != shape] + [row(m, n, given.rank, given.runs)]
        print(rows[-1], flush=True)
        save("solver", rows)


if __name__ == "__main__":
    main()
