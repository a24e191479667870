"""The largest eigenvalue of a symmetric operator that need not be semi-definite, from few products with it."""

from collections.abc import Callable

import torch
from torch import Tensor


def largest_eigenvalue(operator: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> float:
    """Return the largest Ritz value of a Lanczos iteration: from below, close after few steps if it stands out.

    Args:
        operator: v (n,) -> K v (n,), K symmetric; noise of a product is felt as a relative error of the same size.
        start: where to start, (n,), not zero.
        steps: products with K at most.
    """
    basis = [start.double() / start.double().norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for _ in range(min(steps, len(start))):
        image = operator(basis[-1].to(start.dtype)).double()
        diagonal.append(image @ basis[-1])
        size = image.norm()
        for _ in range(2):
            for vector in basis:
                image -= (image @ vector) * vector
        rest = image.norm()
        if float(rest) <= 1e-6 * float(size):  # the space is invariant
            break
        beside.append(rest)
        basis.append(image / rest)
    k = len(diagonal)
    projected = torch.diag(torch.stack(diagonal))
    if k > 1:
        off = torch.stack(beside[: k - 1])
        projected = projected + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(projected)[-1])
