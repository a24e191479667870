"""One small map of each family with stated numbers: what the golden files of the tests were written from.

`write_missing` adds files for families that have none yet; existing files are never rewritten, since old checkpoints
must stay readable for good.
"""

import math
from pathlib import Path

import torch

from eckart.maps import (
    NM,
    Bitmap,
    Blocks,
    Cayley,
    Dense,
    Diagonal,
    Hadamard,
    Householder,
    Interleaved,
    Kronecker,
    LinearMap,
    LowRank,
    Masked,
    Permutation,
    Pivoted,
    Placement,
    Product,
    Quantized,
    RowNormalized,
    Scaled,
    Scattered,
    Selection,
    Sparse,
    Sum,
    TensorTrain,
    Tiled,
    Tucker,
)
from eckart.testing.laws import saved


def _grid(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return -1.5, -1.125, -0.75, ...: exact in every dtype, no two alike in a row."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 0.375 - 1.5).reshape(shape).to(dtype)


def golden_maps() -> dict[str, LinearMap]:
    """Return the maps by family."""
    order = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    dense, lowrank = Dense(_grid(3, 2)), LowRank(_grid(3, 1), _grid(1, 2) + 2)
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    places = torch.tensor([[[0, 3], [1, 2]], [[1, 3], [0, 1]]], dtype=torch.uint8)
    columns, starts = torch.tensor([1, 0, 3], dtype=torch.int32), torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    codes = torch.tensor([[209, 88], [46, 3]], dtype=torch.uint8)
    return {
        "Dense": Dense(_grid(2, 3, dtype=torch.bfloat16)),
        "Diagonal": Diagonal(_grid(3)),
        "Permutation": Permutation(order),
        "Selection": Selection(torch.tensor([1, 4], dtype=torch.int32), 6),
        "Placement": Placement(torch.tensor([0, 2], dtype=torch.int32), 5),
        "LowRank": lowrank,
        "Pivoted": Pivoted(_grid(2, 3), _grid(2, 2), order, "rows"),
        "Sparse": Sparse(_grid(3), columns, starts, 4),
        "NM": NM(_grid(2, 2, 2, dtype=torch.float16), places, 4),
        "Kronecker": Kronecker(_grid(2, 1, 2), _grid(2, 2, 1) + 1),
        "Householder": Householder(_grid(2, 3)),
        "Cayley": Cayley(_grid(2, 3), 3),
        "Tiled": Tiled(_grid(3, 2), 5),
        "TensorTrain": TensorTrain(_grid(10), (2, 1), (1, 3), (1, 2, 1)),
        "Tucker": Tucker(_grid(9), (2,), (1, 3), (1, 2, 1)),
        "Bitmap": Bitmap(_grid(2, 2), torch.tensor([[6, 0], [1, 2]], dtype=torch.uint8), 10, 2),
        "Scattered": Scattered(lowrank, torch.tensor([[6, 0], [1, 2], [3, 0]], dtype=torch.uint8), 10),
        "Quantized": Quantized(codes, _grid(2, 2), None, _grid(2, 8), 5, 3, 4),
        "Sum": Sum((dense, lowrank)),
        "Product": Product((dense, Diagonal(_grid(2)))),
        "Scaled": Scaled(dense, 0.1),
        "Blocks": Blocks(((dense, lowrank), (dense, Dense(_grid(3, 2) + 1)))),
        "Interleaved": Interleaved((dense, lowrank), torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.uint8)),
        "RowNormalized": RowNormalized(_grid(3) + 4, Sum((dense, lowrank))),
        "Masked": Masked(dense, mask),
        "Hadamard": Hadamard(dense, lowrank),
    }


def write_missing(folder: Path) -> list[str]:
    """Write the golden files of families that have none, and return their names."""
    folder.mkdir(exist_ok=True)
    missing = [family for family in golden_maps() if not (folder / f"{family}.json").exists()]
    for family in missing:
        text, data = saved(golden_maps()[family])
        (folder / f"{family}.json").write_text(text)
        (folder / f"{family}.safetensors").write_bytes(data)
    return missing
