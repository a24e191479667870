"""Sparse coding of many signals at once against scikit-learn, in one run: seconds, support and error.

    python benchmarks/sparse_coding.py [--runs 5] [--atoms 512] [--signals 2000] [--nonzeros 16] [--width 128]

Both are given the Gram matrix and the correlations, float64. Support: share of the chosen atoms that agree.
"""

import argparse
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import orthogonal_mp_gram

from eckart.linalg import orthogonal_matching_pursuit
from harness import load, medians, save


def row(atoms: int, signals: int, nonzeros: int, width: int, dtype: torch.dtype, runs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(atoms, width, generator=generator, dtype=torch.float64)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    x = torch.randn(signals, width, generator=generator, dtype=torch.float64)
    gram, correlations = dictionary @ dictionary.mT, x @ dictionary.mT
    ours = gram.to(dtype), correlations.to(dtype)
    theirs = gram.numpy(), np.asfortranarray(correlations.mT.numpy())
    times = medians(
        {
            "eckart": lambda: orthogonal_matching_pursuit(*ours, nonzeros),
            "scikit-learn": lambda: orthogonal_mp_gram(*theirs, n_nonzero_coefs=nonzeros),
        },
        runs=runs,
    )
    found, values = orthogonal_matching_pursuit(*ours, nonzeros)
    code = torch.zeros(signals, atoms, dtype=torch.float64).scatter(1, found, values.double())
    expected = torch.from_numpy(orthogonal_mp_gram(*theirs, n_nonzero_coefs=nonzeros).T.copy())
    codes = {"eckart": code, "scikit-learn": expected}
    return {
        "atoms": atoms,
        "signals": signals,
        "nonzeros": nonzeros,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": times,
        "ratio": times["scikit-learn"] / times["eckart"],
        "support": float(((code != 0) & (expected != 0)).sum() / (expected != 0).sum()),
        "error": {name: float((x - c @ dictionary).norm() / x.norm()) for name, c in codes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("runs", 5), ("atoms", 512), ("signals", 2000), ("nonzeros", 16), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rows = load("sparse_coding")["rows"]
    for dtype in (torch.float64, torch.float32):
        new = row(given.atoms, given.signals, given.nonzeros, given.width, dtype, given.runs)
        same = ("atoms", "signals", "nonzeros", "width", "dtype")
        rows = [r for r in rows if any(r[key] != new[key] for key in same)] + [new]
        print(new, flush=True)
        save("sparse_coding", rows)


if __name__ == "__main__":
    main()
