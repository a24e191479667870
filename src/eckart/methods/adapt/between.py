"""What a method does between optimizer steps: what it says of itself, and how an optimizer is made to do it.

    prepare, once, when an optimizer is followed        behind, after every step: index of steps, the optimizer's state

torch calls what is registered behind every step of an optimizer, so that it happens in any loop. Everything that
changes is a parameter or buffer of the adapter, the count of steps included, and what is random is drawn from the seed
and the step; so whoever saves the model's state and the optimizer's, and follows before loading them, goes on in the
same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from eckart.errors import EckartError
from eckart.hosts import AdaptedHost, Adapter
from eckart.methods.adapt.layer import Layer

# The buffer of the first adapter that counts the steps.
COUNT = "steps_followed"


@dataclass(frozen=True, slots=True)
class Behind:
    """An optimizer step that was just made.

    Attributes:
        index: from 0.
        steps: how many there will be.
        optimizer: the one of torch that made it.
    """

    index: int
    steps: int
    optimizer: Optimizer


@dataclass(frozen=True, slots=True)
class Between:
    """What a method does between optimizer steps, layer by layer, without gradients.

    Attributes:
        prepare: told the number of steps before the first; gives the adapter the buffers and changes that it needs.
        behind: called after every step.
    """

    prepare: Callable[[Layer, Adapter, int], None]
    behind: Callable[[Layer, Adapter, Behind], None]


@dataclass(frozen=True, slots=True)
class Followed:
    """An adapter of a layer that moves between steps."""

    name: str
    host: AdaptedHost
    adapter: Adapter
    layer: Layer
    between: Between


def follow(followed: Sequence[Followed], optimizer: Any, steps: int) -> RemovableHandle:
    """Have everything done that methods do between the steps of an optimizer; `remove()` of what is returned ends it.

    Args:
        followed: the adapters.
        optimizer: of torch, or a wrapper that holds it as `optimizer`, as accelerate's does.
        steps: how many steps it will make; behind later ones nothing is done.

    Raises:
        EckartError: if the optimizer does not train them, or is followed already.
    """
    if steps < 1:
        raise EckartError(f"steps must be at least 1, got {steps}")
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise EckartError(f"only an optimizer of torch can be followed, got a {type(optimizer).__name__}")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for one in followed:
        if not all(id(parameter) in held for parameter in one.adapter.trained()):
            raise EckartError(
                f"this optimizer does not train the adapter {one.name!r}; make it of what parameter_groups() returns"
            )
    if any(isinstance(hook, _Following) for hook in optimizer._optimizer_step_post_hooks.values()):
        raise EckartError("this optimizer is followed already; call remove() of what follow() returned first")
    with torch.no_grad():
        for one in followed:
            one.between.prepare(one.layer, one.adapter, steps)
    for one in followed[:1]:
        one.adapter.register_buffer(COUNT, torch.zeros((), dtype=torch.int64, device=one.layer.device))
    return optimizer.register_step_post_hook(_Following(followed, steps))


class _Following:
    """What torch calls behind every step."""

    def __init__(self, followed: Sequence[Followed], steps: int) -> None:
        self.followed, self.steps = followed, steps

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.followed:
            return
        count = self.followed[0].adapter.get_buffer(COUNT)
        index = int(count)
        count += 1
        for one in self.followed if index < self.steps else ():
            if one.name in one.host.active:
                one.between.behind(one.layer, one.adapter, Behind(index, self.steps, optimizer))
