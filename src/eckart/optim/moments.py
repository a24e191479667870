"""What an optimizer remembers of a parameter, where parts of it start anew or move: any optimizer of torch.

What has the parameter's shape (Adam's moments, a momentum) belongs to its entries; the rest (a count of steps) to all.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer


def forget(optimizer: Optimizer, parameter: nn.Parameter, part: tuple[slice | int | Tensor, ...]) -> None:
    """Set to zero what an optimizer remembers of a part of a parameter."""
    for tensor in optimizer.state.get(parameter, {}).values():
        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
            tensor[part] = 0


def carry_over(optimizer: Optimizer, parameter: nn.Parameter, carry: Callable[[Tensor], Tensor]) -> None:
    """Give a parameter other entries in place, and what an optimizer remembers of them along, old -> new alike."""
    for tensor in (parameter, *optimizer.state.get(parameter, {}).values()):
        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
            tensor.copy_(carry(tensor))


def count_apart(optimizer: Optimizer, parameter: nn.Parameter, counts: Tensor) -> None:
    """Correct Adam's last step where entries started later than their parameter.

    Adam divides its moments by 1 - beta^t, t the steps of the whole parameter. Where the moments were set to zero k
    steps ago that should be 1 - beta^k: otherwise the next steps are up to six times too long. Other optimizers than
    torch's Adam and AdamW are left alone.

    Args:
        optimizer: just made a step.
        parameter: the parameter, moved in place.
        counts: k, of a shape that broadcasts to the parameter's; what is not 1 or more and finite is left alone.
    """
    state = optimizer.state.get(parameter, {})
    if not isinstance(optimizer, Adam | AdamW) or "step" not in state:
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    first, second = state["exp_avg"], state.get("max_exp_avg_sq", state["exp_avg_sq"])
    steps = state["step"].to(first.device, torch.float64)
    (beta, beta2), eps = group["betas"], group["eps"]

    def step(count: Tensor) -> Tensor:
        """Return the step over its rate, as Adam makes it after so many."""
        mean, square = ((1 - b**count).to(first.dtype) for b in (beta, beta2))
        moved: Tensor = (first / mean) / ((second / square).sqrt() + eps)
        return moved

    late = (counts >= 1) & counts.isfinite()
    parameter.add_(group["lr"] * (step(steps) - step(counts.double().where(late, steps))))
