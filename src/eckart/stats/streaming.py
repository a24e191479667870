"""The streaming passes: moments of every layer's inputs on the way forward, of its output gradients on the way back.

Memory holds one block, its statistics and the hidden states of the samples; the inputs of every block are kept on disk
between the two passes. Layers of a block that are called with the same tensor (q/k/v, gate/up) share their statistics.

Legend: samples are batches of token ids (b, t) without padding; hidden states are lists of (b, t, d), one per batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.hosts import Blockwise, Call, linear_layers
from eckart.progress import Progress, silent
from eckart.stats.moments import Gradients, GradientSum, Moments, MomentSum
from eckart.stats.objectives import Objective
from eckart.stats.store import Store


@dataclass(frozen=True, slots=True)
class Stream:
    """The samples on their way through the blocks.

    Attributes:
        hidden: the current block's input, (b, t, d) per batch.
        calls: for every batch, the call of every block.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]


def enter(runner: Blockwise, samples: Sequence[Tensor], embedding: nn.Module | None = None) -> Stream:
    """Compute the input of the first block for every batch.

    Args:
        runner: the model.
        samples: batches of ids (b, t).
        embedding: a replacement of the token embedding.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    with torch.no_grad(), runner.resident_ends(head=False, embedding=embedding is None):
        for ids in samples:
            first, recorded = runner.enter(ids, embedding)
            hidden.append(first)
            calls.append(_shared(recorded, calls))
    return Stream(hidden, calls)


def _shared(calls: list[Call], earlier: list[list[Call]]) -> list[Call]:
    """Return an earlier batch's calls if they are equal, so that masks and position tables are held once."""
    for other in earlier:
        if all(_equal(a.args, b.args) and _equal(a.kwargs, b.kwargs) for a, b in zip(calls, other, strict=True)):
            return other
    return calls


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or a == b


@torch.no_grad()
def advance(
    runner: Blockwise,
    block: nn.Module,
    index: int,
    stream: Stream,
    see: Callable[[Tensor, Tensor], None] | None = None,
) -> None:
    """Replace the stream's hidden states by the block's outputs, in place; `see` is given both, batch by batch."""
    for i, calls in enumerate(stream.calls):
        out = runner.run(block, stream.hidden[i], calls[index])
        if see is not None:
            see(stream.hidden[i], out)
        stream.hidden[i] = out


class StopBlockError(Exception):
    """Raised by a hook to leave a block early: everything wanted of it was seen."""


@contextmanager
def hooked(layers: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` with the input of each layer before it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, args[0])  # returns None: a value returned here would replace the layer's input

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_groups(runner: Blockwise, block: nn.Module, name: str, index: int, stream: Stream) -> list[list[str]]:
    """Return the block's linear layers in execution order, those called with the same tensor in one group.

    Args:
        runner: the model.
        block: the resident block.
        name: its name, the prefix of its layers' names.
        index: its position.
        stream: hidden states at its input; one sequence of the first batch is run.
    """
    seen: list[tuple[str, Tensor]] = []  # holds the tensors, so that no identity is reused
    with hooked(linear_layers(block, name), lambda layer, x: seen.append((layer, x))):
        runner.run(block, stream.hidden[0], stream.calls[0][index])
    groups: list[tuple[Tensor, list[str]]] = []
    for layer, x in seen:
        for tensor, names in groups:
            if tensor is x:
                names.append(layer)
                break
        else:
            groups.append((x, [layer]))
    return [names for _, names in groups]


def collect_inputs(
    runner: Blockwise,
    samples: Sequence[Tensor],
    store: Store,
    *,
    boundaries: Store | None = None,
    progress: Progress = silent,
) -> None:
    """Run all blocks forward and store the input moments of every group of layers.

    Writes kind "inputs", one file per block, with a part per group named by its layers joined with "+"; kind
    "head-inputs" if the model has a head; and, if `boundaries` is given, kind "boundary": the hidden states before
    every block and after the last. Kind "influence" says how far each block turns its input: 1 - E cos(x, y), the
    block influence of Men et al. 2024, "ShortGPT". Blocks that are stored already, by a run that was stopped, are not
    run again.
    """
    count = len(runner.parts.blocks)
    stream = enter(runner, samples)
    done = _resumable(store, boundaries, count)
    if done and boundaries is not None:
        stream.hidden[:] = load_hidden(boundaries, done, runner.device)
    for index, name in list(enumerate(runner.parts.blocks))[done:]:
        progress("forward", index, count)
        if boundaries is not None and index == 0:
            save_hidden(boundaries, index, stream.hidden)
        with runner.resident(name) as block:
            groups = input_groups(runner, block, name, index, stream)
            moments, influence = _run_with_moments(runner, block, name, index, stream, groups)
        if boundaries is not None:
            save_hidden(boundaries, index + 1, stream.hidden)
        store.save("influence", index, {"block": {"influence": influence}})
        store.save("inputs", index, {"+".join(g): m.tensors() for g, m in zip(groups, moments, strict=True)})
    if runner.parts.head is not None:
        store.save("head-inputs", 0, {"head": _head_moments(runner, runner.parts.head, stream).tensors()})
    progress("forward", count, count)


def _resumable(store: Store, boundaries: Store | None, count: int) -> int:
    """Return how many blocks need not be run again: their moments and all hidden states so far are stored."""
    if boundaries is None:
        return 0
    done = next((i for i in range(count) if not store.path("inputs", i).is_file()), count)
    return done if boundaries.has("boundary", done + 1) else 0


@torch.no_grad()
def _head_moments(runner: Blockwise, head: str, stream: Stream) -> Moments:
    module = runner.model.get_submodule(head)
    total = MomentSum(_fan_in(module), runner.device)
    for x in head_inputs(runner, head, stream.hidden):
        total.add(x)
    return total.result(head)


@torch.no_grad()
def head_inputs(runner: Blockwise, head: str, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the input of the output head, (b, t, d) per batch, given the last block's outputs."""
    seen: list[Tensor] = []

    def see(_: str, x: Tensor) -> None:
        seen.append(x)
        raise StopBlockError

    with runner.resident_ends(head=False, embedding=False), hooked({head: runner.model.get_submodule(head)}, see):
        for states in hidden:
            with contextlib.suppress(StopBlockError):
                runner.leave(states)
            yield seen.pop()


@torch.no_grad()
def _run_with_moments(
    runner: Blockwise, block: nn.Module, name: str, index: int, stream: Stream, groups: list[list[str]]
) -> tuple[list[Moments], Tensor]:
    """Run a block; return the moments of every group's input, and the block's influence."""
    layers = linear_layers(block, name)
    first = {g[0]: layers[g[0]] for g in groups}  # one hook per group is enough
    sums = {layer: MomentSum(int(_fan_in(module)), runner.device) for layer, module in first.items()}
    cosines: list[Tensor] = []

    def see(x: Tensor, y: Tensor) -> None:
        cosines.append(nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).flatten().double())

    with hooked(first, lambda layer, x: sums[layer].add(x)):
        advance(runner, block, index, stream, see)
    return [sums[g[0]].result(" and ".join(g)) for g in groups], 1 - torch.cat(cosines).mean()


def _fan_in(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]  # type: ignore[index,return-value]


def _fan_out(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.weight.shape[1]  # type: ignore[index,return-value]


def save_hidden(store: Store, index: int, hidden: list[Tensor], kind: str = "boundary") -> None:
    """Store hidden states as kind `kind`."""
    store.save(kind, index, {"hidden": {f"{i:06d}": h for i, h in enumerate(hidden)}})


def load_hidden(store: Store, index: int, device: torch.device, kind: str = "boundary") -> list[Tensor]:
    """Load what `save_hidden` stored."""
    parts = store.load(kind, index)["hidden"]
    return [parts[key].to(device) for key in sorted(parts)]


def collect_gradients(
    runner: Blockwise,
    samples: Sequence[Tensor],
    objective: Objective,
    store: Store,
    boundaries: Store,
    *,
    seed: int = 0,
    weights: bool = False,
    progress: Progress = silent,
) -> None:
    """Run all blocks backward from the objective and store the output-gradient moments of every layer.

    Needs the boundaries that `collect_inputs` stored. Writes kind "gradients-<objective>", one file per block with a
    part per layer, and kind "ends-<objective>" with the parts "embedding" (second moment of the gradient at its output,
    and token counts) and, if the model has a head, "head" (second moment of its input, mean probability of tokens);
    with `weights` also kind "weight-gradients-<objective>", the mean gradient of every layer's weight.
    """
    count, kind = len(runner.parts.blocks), f"gradients-{objective.name}"
    ends = _Ends(runner)
    gradients = ends.from_objective(samples, load_hidden(boundaries, count, runner.device), objective, seed, progress)
    stream = enter(runner, samples)
    for index in reversed(range(count)):
        progress("backward", count - index, count + 1)
        name = runner.parts.blocks[index]
        inputs = load_hidden(boundaries, index, runner.device)
        with runner.resident(name) as block:
            layers = linear_layers(block, name)
            sums = {
                layer: GradientSum(_fan_out(module), runner.device, _fan_in(module) if weights else None)
                for layer, module in layers.items()
            }
            with _recording_gradients(layers, sums):
                for i, calls in enumerate(stream.calls):
                    gradients[i] = _backward(runner, block, inputs[i], calls[index], gradients[i])
        reached = {layer: s for layer, s in sums.items() if s.count}
        store.save(kind, index, {layer: s.result(layer).tensors() for layer, s in reached.items()})
        if weights:
            store.save(f"weight-{kind}", index, {layer: {"mean": s.of_weight()} for layer, s in reached.items()})
    ends.into_embedding(samples, gradients)
    store.save(f"ends-{objective.name}", 0, ends.parts(samples))
    progress("backward", count + 1, count + 1)


def _backward(runner: Blockwise, block: nn.Module, hidden: Tensor, call: Call, gradient: Tensor) -> Tensor:
    """Return the gradient at a block's input given that at its output; hooks see the layers' gradients on the way."""
    hidden = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        out = runner.run(block, hidden, call)
    (back,) = torch.autograd.grad(out, hidden, gradient)
    return back.detach()


@contextmanager
def _recording_gradients(layers: dict[str, nn.Module], sums: dict[str, GradientSum]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            x = args[0].detach()
            if out.requires_grad:
                out.register_hook(lambda gradient: sums[name].add(_batched(x), _batched(gradient)))

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batched(x: Tensor) -> Tensor:
    """Return x as (sequences, vectors, size); inputs without a batch axis count as one sequence."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


class _Ends:
    """What surrounds the blocks: the objective's gradient at the last hidden state, moments of head and embedding."""

    # Rows of logits held at once, in numbers: with gradients and probabilities about four times as many floats.
    LOGITS = 1 << 24

    def __init__(self, runner: Blockwise) -> None:
        self.runner = runner
        self._head: MomentSum | None = None
        self._probability: Tensor | None = None
        self._embedding: MomentSum | None = None

    def from_objective(
        self, samples: Sequence[Tensor], hidden: list[Tensor], objective: Objective, seed: int, progress: Progress
    ) -> list[Tensor]:
        """Return the gradient at the last hidden state, per batch."""
        head = self.runner.parts.head
        module = self.runner.model.get_submodule(head) if head else None
        vocabulary = _fan_out(module) if module is not None else 1
        if module is not None:
            self._head = MomentSum(_fan_in(module), self.runner.device)
            self._probability = torch.zeros(vocabulary, dtype=torch.float64, device=self.runner.device)
        out = []
        with self.runner.resident_ends(head=True, embedding=False):
            for i, (ids, states) in enumerate(zip(samples, hidden, strict=True)):
                progress("objective", i, len(hidden))
                step = max(1, self.LOGITS // (ids.shape[1] * vocabulary))
                pieces = zip(ids.split(step), states.split(step), strict=True)
                seeds = (seed + 7919 * i + 104729 * j for j in range(ids.shape[0]))  # a piece has a sequence at least
                out.append(
                    torch.cat(
                        [self._gradient(a, b, objective, own) for (a, b), own in zip(pieces, seeds, strict=False)]
                    )
                )
        return out

    def _gradient(self, ids: Tensor, states: Tensor, objective: Objective, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        states = states.detach().requires_grad_(True)
        head = self.runner.parts.head
        watched = {head: self.runner.model.get_submodule(head)} if head else {}
        with torch.enable_grad(), hooked(watched, lambda _, x: self._head.add(x) if self._head else None):
            output = self.runner.leave(states)
            value = objective.scalar(output, ids, generator)
        if self._probability is not None:
            self._probability += output.logits.detach().float().softmax(-1).flatten(0, -2).sum(0, dtype=torch.float64)
        return torch.autograd.grad(value, states)[0].detach()

    def into_embedding(self, samples: Sequence[Tensor], gradients: list[Tensor]) -> None:
        """Carry the gradients at the first block's input back to the embedding's output and add up their moment."""
        name = self.runner.parts.embedding
        if name is None:
            return
        with self.runner.resident_ends(head=False, embedding=True):
            module = self.runner.model.get_submodule(name)
            self._embedding = MomentSum(int(module.embedding_dim), self.runner.device)  # type: ignore[arg-type]
            looked_up: list[Tensor] = []
            handle = module.register_forward_hook(lambda m, a, out: looked_up.append(out.requires_grad_(True)))
            try:
                for ids, gradient in zip(samples, gradients, strict=True):
                    looked_up.clear()
                    with torch.enable_grad():
                        first, _ = self.runner.enter(ids)
                    self._embedding.add(torch.autograd.grad(first, looked_up[0], gradient)[0])
            finally:
                handle.remove()

    def parts(self, samples: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return what was gathered, for saving."""
        out: dict[str, dict[str, Tensor]] = {}
        name = self.runner.parts.embedding
        if self._embedding is not None and name is not None:
            size = int(self.runner.model.get_submodule(name).num_embeddings)  # type: ignore[arg-type]
            out["embedding"] = {
                "second": self._embedding.result(name).second,
                "counts": token_counts(samples, size),
            }
        if self._head is not None and self._probability is not None and self.runner.parts.head:
            moments = self._head.result(self.runner.parts.head)
            out["head"] = {**moments.tensors(), "probability": self._probability / moments.count}
        return out


def token_counts(samples: Sequence[Tensor], vocabulary: int) -> Tensor:
    """Return how often each token occurs in the samples, (V,) float64."""
    return sum(
        (torch.bincount(ids.flatten().cpu(), minlength=vocabulary).double() for ids in samples),
        torch.zeros(vocabulary, dtype=torch.float64),
    )


def gradients_of(store: Store, objective: Objective, index: int) -> dict[str, Gradients]:
    """Load the gradient moments of one block by layer name."""
    return {layer: Gradients.of(t) for layer, t in store.load(f"gradients-{objective.name}", index).items()}


def weight_gradients_of(store: Store, objective: Objective, index: int) -> dict[str, Tensor]:
    """Load the mean gradients of one block's weights, (m, n) by layer name."""
    return {layer: t["mean"] for layer, t in store.load(f"weight-gradients-{objective.name}", index).items()}


def inputs_of(store: Store, index: int) -> dict[str, Moments]:
    """Load the input moments of one block by layer name; layers of a group share one object."""
    out = {}
    for group, tensors in store.load("inputs", index).items():
        moments = Moments.of(tensors)
        out.update(dict.fromkeys(group.split("+"), moments))
    return out
