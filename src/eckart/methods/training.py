"""The loop of every method that learns: AdamW on windows of text, resumable, reproducible, stopped where it diverges.

Nothing random outlives a step: the order of windows comes from (seed, epoch), whatever a step draws from (seed, step).
So the state of a run is its trained parameters, its buffers, the optimizer's moments and the number of steps done, one
safetensors file written atomically; a run that was killed goes on from the last one and ends in the same bits.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eckart.atomic import write_tensors
from eckart.errors import EckartError
from eckart.linalg import all_finite
from eckart.progress import Progress

# A loss beyond this many times its first value (or beyond this many, if it began below 1) does not come back.
FAR = 10.0
CLIP = 1.0
# A stride between the seeds of runs that is larger than any number of steps.
STRIDE = 1_000_003


class DivergedError(EckartError):
    """A run whose loss became NaN, Inf or far larger than it was at first."""


@dataclass(frozen=True, slots=True)
class Course:
    """How long and how fast a method trains.

    Attributes:
        steps: optimizer steps at most.
        rate: largest learning rate of AdamW, without weight decay.
        batch: windows of text per step.
        final: share of the rate that the cosine ends at; 1 for a constant rate.
        warm_up: share of the steps in which the rate rises linearly.
        save_every: steps between two states on disk.
    """

    steps: int
    rate: float
    batch: int
    final: float = 0.1
    warm_up: float = 0.05
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise EckartError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise EckartError(f"{name} must be at least 1, got {value}")
        if not self.rate > 0:
            raise EckartError(f"rate must be positive, got {self.rate}")
        if math.isinf(self.rate):
            raise EckartError("rate must be finite, got inf")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine down to `final`."""
        warm = max(1, round(self.warm_up * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run.

    Attributes:
        index: from 0.
        samples: its windows, (batch, ...).
        generator: what is random in this step, on the CPU.
        rate: its learning rate.
    """

    index: int
    samples: Tensor
    generator: torch.Generator
    rate: float


# Returns (what is minimised, what tells whether the run diverges).
StepLoss = Callable[[Step], tuple[Tensor, Tensor]]
# Called behind the update; returns True to end the run.
After = Callable[[Step], bool]
# Called with the optimizer before the first step; returns the names of frozen parameters that change between steps.
Follow = Callable[[Any], Iterable[str]]
# Share of the learning rate by parameter name.
Share = Callable[[str], float]
# Whether the gradient of a parameter of that name is clipped with those of its like, apart from the others.
Apart = Callable[[str], bool]


def train(
    trained: nn.Module,
    samples: Tensor | Sequence[Tensor],
    course: Course,
    loss: StepLoss,
    *,
    state: Path,
    seed: int,
    stage: str = "train",
    after: After | None = None,
    follow: Follow = lambda optimizer: (),
    share: Share = lambda name: 1.0,
    apart: Apart = lambda name: False,
    progress: Progress,
) -> None:
    """Train a module in place, or put it where an earlier run of the same call left it.

    Args:
        trained: holds every parameter that is trained (those that require gradients) and every buffer that changes.
        samples: windows of text, (count, ...), `course.batch` of them a step; or those of a step each, (b, ...).
        course: how long and how fast.
        loss: the loss of a step.
        state: file of the run's state.
        seed: seed of order and draws.
        stage: what the run is called in progress and errors.
        after: called behind every update.
        follow: called with the optimizer before the first; what it has done behind each may change shapes.
        share: of the learning rate that a parameter of that name has.
        apart: whose gradients are clipped on their own, as those of a growing penalty would silence the others.
        progress: told of the stage.

    Raises:
        DivergedError: if the loss becomes NaN, Inf or far larger than it was at first; the last good state is kept.
    """
    device = samples[0].device
    accelerator = _accelerator(device)
    parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    optimizer = accelerator.prepare(torch.optim.AdamW(_groups(parameters, share), lr=course.rate, weight_decay=0.0))
    run = _Run(trained, parameters, optimizer, state, tuple(follow(optimizer)))
    index, finished, first = run.restore()
    while index < course.steps and not finished:
        progress(stage, index, course.steps)
        step = _step(samples, course, index, seed)
        for group in optimizer.param_groups:
            group["lr"] = step.rate * group["share"]
        with torch.enable_grad(), seeded(device, seed * STRIDE + index):
            total, task = loss(step)
        value = float(task.detach())
        first = value if first is None else first
        if not math.isfinite(value + float(total.detach())) or value > FAR * max(first, 1.0):
            raise _diverged(stage, index, value, first, state)
        if index % course.save_every == 0:  # parameters whose loss was just found to be good
            run.save(index, False, first)
        _update(accelerator, optimizer, total, parameters, apart)
        index, finished = index + 1, after is not None and after(step)
    if not all(all_finite(p.detach()) for p in parameters.values()):
        raise _diverged(stage, index, math.nan, first or 0.0, state)
    run.finish(index, first or 0.0)
    optimizer.zero_grad(set_to_none=True)
    progress(stage, course.steps, course.steps)


def _accelerator(device: torch.device) -> Accelerator:
    accelerator = Accelerator(cpu=device.type == "cpu")
    if accelerator.num_processes > 1:
        raise EckartError("training runs in one process; start the command without a launcher")
    return accelerator


def _groups(parameters: Mapping[str, nn.Parameter], share: Share) -> list[dict[str, Any]]:
    """Return the optimizer's groups: parameters with one share of the learning rate together."""
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(share(name), {"params": [], "share": share(name)})["params"].append(parameter)
    return list(groups.values())


def _update(
    accelerator: Accelerator, optimizer: Any, total: Tensor, parameters: Mapping[str, nn.Parameter], apart: Apart
) -> None:
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(total)
    for own in (False, True):
        together = [p for name, p in parameters.items() if apart(name) is own]
        if together:
            accelerator.clip_grad_norm_(together, CLIP)
    optimizer.step()


def _diverged(stage: str, index: int, value: float, first: float, state: Path) -> "DivergedError":
    return DivergedError(
        f"the {stage} run diverged at step {index}: its loss went from {first:.4g} to {value:.4g}; the last good state "
        f"is kept in {state}; use a smaller learning rate"
    )


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators for a while: dropout takes no other."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call for CUDA, every time
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


def _step(samples: Tensor | Sequence[Tensor], course: Course, index: int, seed: int) -> Step:
    """Return a step with its windows: every epoch in an order of its own, batches across epochs' ends."""
    batch = course.batch if isinstance(samples, Tensor) else 1
    count, at = len(samples), index * batch
    orders: dict[int, Tensor] = {}
    rows = []
    for i in range(at, at + batch):
        epoch = i // count
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * STRIDE + epoch))
        rows.append(int(orders[epoch][i % count]))
    generator = torch.Generator().manual_seed(seed * STRIDE + index)
    drawn = samples[rows] if isinstance(samples, Tensor) else samples[rows[0]]
    return Step(index, drawn, generator, course.rate_at(index))


@dataclass(slots=True)
class _Run:
    """The state of a run, in memory and on disk."""

    trained: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    path: Path
    moving: tuple[str, ...] = ()
    complete: bool = False

    def held(self) -> dict[str, Tensor]:
        """Return everything that changes, by name."""
        moving = {name: self.trained.get_parameter(name) for name in self.moving}
        return {**self.parameters, **moving, **dict(self.trained.named_buffers())}

    def save(self, steps: int, finished: bool, first: float) -> None:
        tensors = {f"model|{name}": tensor for name, tensor in self.held().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer|{i}|{key}": value for key, value in values.items()}
        write_tensors(self.path, tensors, {"steps": str(steps), "finished": str(int(finished)), "first": first.hex()})
        self.complete = finished

    def finish(self, steps: int, first: float) -> None:
        """Save the run's last state, unless it was restored."""
        if not self.complete:
            self.save(steps, True, first)

    def restore(self) -> tuple[int, bool, float | None]:
        """Return steps done, whether the run is finished, and the first loss, None for a new run."""
        if not self.path.is_file():
            return 0, False, None
        try:
            with safe_open(self.path, "pt") as handle:
                metadata = handle.metadata()
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise EckartError(f"{self.path} is damaged ({error}); delete it and run again") from error
        if not {f"model|{name}" for name in self.held()} <= tensors.keys():
            raise EckartError(f"{self.path} holds the state of another run or version; delete it and run again")
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in self.held().items():
                saved = tensors.pop(f"model|{name}")
                if tensor.shape != saved.shape:
                    tensor.data = tensor.new_empty(saved.shape)
                tensor.copy_(saved)
        for name, tensor in tensors.items():
            _, i, key = name.split("|")
            moments.setdefault(int(i), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.complete = metadata["finished"] == "1"
        return int(metadata["steps"]), self.complete, float.fromhex(metadata["first"])
