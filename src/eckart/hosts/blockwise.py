"""Running a transformer block by block, with no more than one block's weights in memory.

The model is a skeleton whose parameters may be on the meta device. `enter` computes the input of the first block and
the arguments every block is called with; `run` applies one resident block; `leave` finishes from the last hidden state.
None of this knows the model's class: blocks are replaced by recorders for one ordinary forward pass.

Legend: b sequences, t tokens per sequence, d the width of the hidden states.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.hosts.anatomy import Anatomy, replace
from eckart.hosts.memory import return_memory

# Fills the own parameters of one module of the skeleton (not of its children), given its name, with real weights.
Load = Callable[[nn.Module, str], None]


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments a block is called with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    pass


class _Output(Tensor):
    """A block's output that is its own first item: some models take what a block returns, others its `[0]`."""

    # What is computed from it is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]


class _Recorder(nn.Module):
    """Stands in for a block: records its call and passes `hidden`, or its own input, on."""

    def __init__(
        self, original: nn.Module, calls: list[tuple[Tensor, Call]], last: bool, hidden: Tensor | None
    ) -> None:
        super().__init__()
        self._calls, self._last, self._hidden = calls, last, hidden
        self._original = (original,)

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of their blocks (layer type, attention kind) to choose their arguments.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._original[0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._calls.append((hidden, Call(args, kwargs)))
        if self._hidden is None and self._last:
            raise _Stop
        out = hidden if self._hidden is None or not self._last else self._hidden
        return out.as_subclass(_Output)


class Blockwise:
    """A skeleton model run block by block.

    Attributes:
        model: the skeleton; parameters on the meta device except while resident.
        parts: its anatomy.
        device: where blocks are run.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, load: Load, device: torch.device) -> None:
        self.model, self.parts, self.device, self._load = model.eval(), parts, device, load
        for buffer_name, buffer in list(model.named_buffers()):
            owner, _, name = buffer_name.rpartition(".")
            if buffer.device.type != "meta":
                model.get_submodule(owner)._buffers[name] = buffer.to(device)

    def _fill(self, module: nn.Module, name: str) -> None:
        """Load a module's own parameters and put them where blocks are run."""
        self._load(module, name)
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.device != self.device:
                module._parameters[key] = nn.Parameter(parameter.detach().to(self.device), requires_grad=False)

    @contextmanager
    def resident(self, name: str) -> Iterator[nn.Module]:
        """Load the weights of a module of the skeleton, and put them back on the meta device afterwards."""
        module = self.model.get_submodule(name)
        for inner, child in module.named_modules():
            self._fill(child, f"{name}.{inner}" if inner else name)
        try:
            yield module
        finally:
            for child in module.modules():
                release(child)
            return_memory()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Load the weights of the whole skeleton, for methods that train it, and put them back afterwards."""
        for name, module in self.model.named_modules():
            self._fill(module, name)
        try:
            yield self.model
        finally:
            for module in self.model.modules():
                release(module)
            return_memory()

    @contextmanager
    def resident_ends(self, head: bool, embedding: bool) -> Iterator[None]:
        """Load what surrounds the blocks: norms and position tables always, head and embedding as asked for."""
        skipped = {*self.parts.blocks}
        skipped |= {self.parts.head} if self.parts.head and not head else set()
        skipped |= {self.parts.embedding} if self.parts.embedding and not embedding else set()
        names = _outside(self.model, {name for name in skipped if name})
        for name in names:
            self._fill(self.model.get_submodule(name), name)
        try:
            yield
        finally:
            for name in names:
                release(self.model.get_submodule(name))

    def enter(self, ids: Tensor, embedding: nn.Module | None = None) -> tuple[Tensor, list[Call]]:
        """Return the first block's input (b, t, d) and the call of every block, for token ids (b, t).

        Needs `resident_ends(embedding=True)`.

        Args:
            ids: (b, t) int64, no padding.
            embedding: a module to use in place of the model's token embedding.
        """
        calls: list[tuple[Tensor, Call]] = []
        swaps = {} if embedding is None else {self._embedding_name(): embedding}
        with self._recording(calls, None), self.swapped(swaps), suppress(_Stop):
            self.model(input_ids=ids.to(self.device), use_cache=False)
        if len(calls) != len(self.parts.blocks):
            count = len(self.parts.blocks)
            raise EckartError(
                f"{type(self.model).__name__} ran {len(calls)} of its {count} blocks; it cannot be streamed"
            )
        return calls[0][0], [call for _, call in calls]

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """Apply one resident block: (b, t, d) -> (b, t, d)."""
        out = block(hidden, *call.args, **call.kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def leave(self, hidden: Tensor) -> Any:
        """Return the model's output given the last block's output (b, t, d). Needs `resident_ends(head=True)`."""
        # The first embeddings go into blocks that ignore them; only their width matters, where a model widens them.
        embedding = self.model.get_submodule(self.parts.embedding) if self.parts.embedding else None
        width = getattr(embedding, "embedding_dim", hidden.shape[-1])
        with self._recording([], hidden):
            return self.model(inputs_embeds=hidden.new_zeros(*hidden.shape[:-1], width), use_cache=False)

    @contextmanager
    def _recording(self, calls: list[tuple[Tensor, Call]], hidden: Tensor | None) -> Iterator[None]:
        originals = {name: self.model.get_submodule(name) for name in self.parts.blocks}
        last = self.parts.blocks[-1]
        for name, original in originals.items():
            self.model.set_submodule(name, _Recorder(original, calls, name == last, hidden))
        try:
            yield
        finally:
            for name, original in originals.items():
                self.model.set_submodule(name, original)

    @contextmanager
    def swapped(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Put modules in place of those of the skeleton by name, and the old ones back afterwards."""
        originals = {name: replace(self.model, name, module) for name, module in modules.items()}
        try:
            yield
        finally:
            for name, original in originals.items():
                self.model.set_submodule(name, original)

    def _embedding_name(self) -> str:
        if self.parts.embedding is None:
            raise EckartError(f"{type(self.model).__name__} has no token embedding that could be replaced")
        return self.parts.embedding


def release(module: nn.Module) -> None:
    """Put a module's own parameters on the meta device, freeing their memory."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _outside(model: nn.Module, skipped: set[str]) -> list[str]:
    """Return the names of the modules that own parameters and lie outside the skipped ones."""
    return [
        name
        for name, module in model.named_modules()
        if any(p is not None for p in module._parameters.values())
        and not any(name == s or name.startswith(f"{s}.") for s in skipped)
    ]
