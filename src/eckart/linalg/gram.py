"""Symmetric products X^T X with half of the multiplications, where a processor forms them."""

from torch import Tensor

# Channels at once on a processor; other devices form the product in one go.
PANEL = 128


def add_upper_gram(total: Tensor, rows: Tensor) -> None:
    """Add X^T X to the diagonal blocks of a sum and to what is right of them; `mirror_upper` fills in the rest.

    Args:
        total: (n, n), in any dtype at least as wide as the product's; changed.
        rows: X (..., n), a matrix; the product is formed in its dtype.
    """
    for at, end in _panels(total):
        total[at:end, at:] += rows[:, at:end].mT @ rows[:, at:]


def mirror_upper(total: Tensor) -> Tensor:
    """Fill in what is below the diagonal blocks of a sum (n, n), and return it."""
    for at, end in _panels(total):
        total[end:, at:end] = total[at:end, end:].mT
    return total


def _panels(total: Tensor) -> list[tuple[int, int]]:
    n = total.shape[0]
    width = PANEL if total.device.type == "cpu" else max(n, 1)
    return [(at, min(at + width, n)) for at in range(0, n, width)]
