"""Counting the multiplications and additions that torch really performs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# One operation per entry of the result.
PER_RESULT = {aten.mul, aten.add, aten.sub, aten.div, aten.pow}
# One addition per entry of the argument at this position.
PER_ARGUMENT = {aten.sum: 0, aten.index_add: 3, aten.scatter_add: 3}


class CountOperations(TorchDispatchMode):
    """Counts the floating-point multiplications and additions inside the `with` block, in `total`.

    Products of matrices count 2 m n k (the table of `torch.utils.flop_counter`), entrywise arithmetic one per entry,
    sums and scattered sums one per term, solutions of equations 2/3 s^3 per matrix of side s and s^2 per triangle and
    column. Roots, comparisons, copies and arithmetic on indices count nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is aten._linalg_solve_ex:
            side = args[0].shape[-1]  # an elimination per matrix, and two triangular solves
            self.total += args[0].numel() // (side * side) * (2 * side**3 // 3) + 2 * side * out[0].numel()
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if packet is aten.mm and args[0].layout == torch.sparse_csr:
            self.total += 2 * args[0].values().numel() * out.shape[1]
        elif packet is aten.linalg_solve_triangular:
            self.total += args[0].shape[-1] * out.numel()
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet in PER_RESULT:
            self.total += out.numel()
        elif packet in PER_ARGUMENT:
            self.total += args[PER_ARGUMENT[packet]].numel()
        return out


def count(function: Callable[[], object]) -> int:
    """Return how many multiplications and additions a call performs."""
    counter = CountOperations()
    with counter, torch.no_grad():
        function()
    return counter.total
