"""Fast paths on accelerators, reached through linalg/; without them everything computes by torch's own operations.

Kernels are written in Triton, which CUDA builds of torch bring along on Linux. On a machine with CUDA and without
triton, and inside `torch.compile`, which fuses by itself, torch's operations are what runs.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rescaled_kernels(tensor: Tensor) -> ModuleType | None:
    """Return `eckart.kernels.rescaled` for a tensor that it computes with, None for what torch has to compute with."""
    fits = tensor.is_cuda and tensor.dtype in DTYPES and not torch.compiler.is_compiling()
    return _rescaled() if fits else None


@cache
def _rescaled() -> ModuleType | None:
    """Load the kernels when the first CUDA tensor needs them: importing triton takes a second."""
    return import_module("eckart.kernels.rescaled") if find_spec("triton") else None
