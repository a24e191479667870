"""Small factored layers without gradients: a temporary dense weight where operator calls cost more than they save."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, is_grad_enabled, matmul, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.functional import linear
from torch.nn.modules import module as torch_module

from eckart.hosts.base import Host
from eckart.hosts.watched import HOOKS, REGISTERED, Watcher, watch
from eckart.maps import Bitmap, Interleaved, LinearMap, LowRank, Pivoted, Product, Quantized, Sum

# A structured layer makes this many more operator calls than a dense one.
EXTRA_CALLS: dict[type[LinearMap], int] = {LowRank: 1, Pivoted: 3, Bitmap: 1}
# One more call costs as much as reading this many float32 numbers for one vector, or as this many multiplications for
# many vectors, on CPU (benchmarks/constants.py). Pivots never win with many vectors on layers as small as that:
# reordering them takes as long as multiplying.
NUMBERS_PER_CALL = 60_000
MULTIPLICATIONS_PER_CALL = 4_000_000
# Thin factors multiply at a lower rate than a square matrix, so that saving less than this share saves no time.
LEAST_SAVING = 0.25
# Multiplying by compressed rows takes the time of a dense product with this many times the non-zeros: 4 to 8, beside
# the call, for matrices of 192 to 1,024 rows at densities of 0.1 to 0.5, one thread.
SPARSE_EFFORT = 5
# Other maps than low-rank and pivoted ones are kept dense between calls up to this many entries, 4 MB of float32: who
# quantizes or prunes a large model does it for memory.
LARGEST = 1 << 20


_Read = tuple[
    Tensor, int, int
]  # a tensor, its version, which in-place writes change, and its address, as another `.data` does
_Part = tuple[dict[str, Any], int]  # attributes of a part and how many they are: what is set on it past torch adds some


class _Decoding(Watcher):
    """A temporary dense weight and all that shows whether it is current.

    What a token looks at has left the cache by the next token, and one such look takes as long as ten lines of Python.
    Hence one object with as few others as possible: the first two parameters are spelled out, and the operand counts
    the version of a buffer along.
    """

    __slots__ = (
        "address",
        "address_2",
        "bias",
        "buffer_version",
        "limit",
        "operand",
        "others",
        "parts",
        "tensor",
        "tensor_2",
        "version",
        "version_2",
        "weight",
        "width",
    )

    limit: float  # an input of so many entries goes through `forward`
    width: int  # of the input of a single token
    weight: Tensor
    operand: Tensor  # the weight if there is a bias; else its transpose, which `F.linear` would make for every token
    bias: Tensor | None
    buffer_version: int | None
    tensor: Tensor
    version: int
    address: int
    tensor_2: Tensor
    version_2: int
    address_2: int
    others: tuple[_Read, ...]
    parts: tuple[_Part, ...]


class TemporaryDense(nn.Module):
    """A module with a structured matrix that can also be had as a temporary dense weight.

    The weight is made when first asked for. It is forgotten with every call with gradients, every change of mode, dtype
    or device, and whenever a tensor is replaced or written to in place, a parameter gets other memory as its `.data`,
    or a part is replaced, hooked or given a `forward`. What is set on a part past torch, in its `__dict__`, shows with
    the next input of more than one token. Only a write into the memory of `.data` leaves no trace; call `train()` or
    `eval()` after one.
    """

    __slots__ = ("_decoding",)  # no attribute: not in copies, and one look at memory instead of four

    _decoding: _Decoding | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a module that has no temporary dense weight, also where `__init__` is not called: in copies."""
        made = super().__new__(cls)
        object.__setattr__(made, "_decoding", None)
        return made

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the matrix as a new tensor."""

    def temporary_dense(self) -> Tensor | None:
        """Return the temporary dense weight, made anew if any factor changed; None where factors must be called."""
        decoding = self._decoding
        if decoding is None or not _is_current(decoding) or _has_changed_parts(decoding):
            decoding = self._decoding = self._decoded()
        return None if decoding is None else decoding.weight

    def forget(self) -> None:
        """Free the temporary dense weight."""
        self._decoding = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the temporary dense weight is forgotten."""
        self._decoding = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the temporary dense weight out of copies."""
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What every move and cast of a module goes through; it may leave identity and version of a parameter alone.
        self._decoding = None
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    @property
    def bias_owner(self) -> nn.Module:
        """The module whose parameter the bias is."""
        return self

    @property
    def shortcut_below(self) -> float:
        """From how many entries of an input on a call has to go through `forward`."""
        return 0

    def _decoded(self) -> _Decoding | None:
        """Return a temporary dense weight and what it was made of; None where the factors must be called."""
        if "forward" in self.__dict__:  # replaced by one that may do anything besides
            return None
        parameters: list[Tensor] = []
        buffers: list[Tensor] = []
        parts: list[nn.Module] = []
        if not self._gather(parameters, buffers, parts):
            return None
        made = _Decoding()
        watch(self, REGISTERED, made)
        for part in parts:
            watch(part, (*REGISTERED, *HOOKS), made)
        made.parts = tuple((part.__dict__, len(part.__dict__)) for part in parts)
        versions = [tensor._version for tensor in (*parameters, *buffers)]  # before they are read
        # The weight may outlive the region it is made in.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            made.weight = self.dense().detach()
            made.bias = self.bias_owner._parameters.get("bias")
            operand = made.weight.t() if made.bias is None else made.weight
            counting = _counting_along(operand, buffers[0]) if buffers else operand
        if counting is None:
            return None
        made.operand, made.width = counting, made.weight.shape[1]
        made.buffer_version = versions.pop(len(parameters)) if buffers else None
        read = [(t, v, t.data_ptr()) for t, v in zip((*parameters, *buffers[1:]), versions, strict=True)]
        made.tensor, made.version, made.address = read[0]
        made.tensor_2, made.version_2, made.address_2 = read[min(1, len(read) - 1)]
        made.others = tuple(read[2:])
        made.limit = 0
        if not (self._forward_hooks or self._forward_pre_hooks):  # those are for `nn.Module.__call__`
            watch(self, HOOKS, made)
            made.limit = self.shortcut_below
        return made

    def _gather(self, parameters: list[Tensor], buffers: list[Tensor], parts: list[nn.Module]) -> bool:
        """Add the tensors the matrix is made of and the modules inside; False where one does anything else besides."""
        parameters += [tensor for name, tensor in self._parameters.items() if tensor is not None and name != "bias"]
        buffers += [tensor for tensor in self._buffers.values() if tensor is not None]
        for part in self._modules.values():
            if part is None:
                return False
            parts.append(part)
            inside = part if isinstance(part, TemporaryDense) and is_untouched(part) else None
            owner = part if inside is None else inside.bias_owner
            if owner is not self.bias_owner and owner._parameters.get("bias") is not None:
                return False
            if inside is None and is_plain(part):
                parameters.append(cast(Tensor, part._parameters["weight"]))
            elif inside is None or not inside._gather(parameters, buffers, parts):
                return False
        # A functional transform puts stand-ins for parameters, and inference tensors do not count their versions.
        return (
            bool(parameters)
            and all(type(tensor) is nn.Parameter for tensor in parameters)
            and not any(tensor.is_inference() for tensor in (*parameters, *buffers))
        )


class DecodingHost(Host, TemporaryDense):
    """A host that computes with a temporary dense weight where that is faster than its structure."""

    def __init__(self, map_: LinearMap) -> None:
        super().__init__(map_.shape)
        self._dense_below = map_.shape[1] * dense_below(map_)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply; where the temporary dense weight serves and nothing is to happen besides, at once.

        What torch does around `forward` costs more than checking the weight, and small layers feel both.
        """
        decoding = self._decoding
        if (
            decoding is None
            or type(x) is not Tensor
            or x.numel() >= decoding.limit
            or is_grad_enabled()
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or is_dynamo_compiling()  # in other traces the input is not a plain tensor
            or not _is_current(decoding)
            or (x.numel() > decoding.width and _has_changed_parts(decoding))
        ):
            return cast(Tensor, super().__call__(x))
        bias = decoding.bias
        return matmul(x, decoding.operand) if bias is None else linear(x, decoding.operand, bias)

    @property
    def shortcut_below(self) -> float:
        """The same as for the temporary dense weight at all; infinity as one object, which stays in the cache."""
        return min(math.inf, self._dense_below)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis: x (..., n) -> (..., m)."""
        if is_grad_enabled():
            self._decoding = None
            return self.structured(x)
        if x.numel() >= self._dense_below or not x.is_cpu or is_compiling():
            return self.structured(x)
        weight = self.temporary_dense()
        return self.structured(x) if weight is None else linear(x, weight, self.offset)

    def kept_table(self, ids: Tensor) -> Tensor | None:
        """Return the temporary dense weight to look rows up in, None where the structure is to be asked."""
        if is_grad_enabled():
            self._decoding = None
            return None
        return self.temporary_dense() if self._dense_below and ids.is_cpu and not is_compiling() else None

    @abstractmethod
    def structured(self, x: Tensor) -> Tensor:
        """Apply through the structure, with the bias."""


def dense_below(map_: LinearMap) -> float:
    """Return the number of vectors from which on a map is faster than its dense weight, 0 if always."""
    full = math.prod(map_.shape)
    if not isinstance(map_, LowRank | Pivoted):
        return math.inf if full <= min(LARGEST, _effort(map_)) else 0
    saved, calls = full - map_.numbers, EXTRA_CALLS[type(map_)]
    if saved >= calls * NUMBERS_PER_CALL:
        return 0
    if isinstance(map_, Pivoted) or saved <= LEAST_SAVING * full:
        return math.inf
    return calls * MULTIPLICATIONS_PER_CALL / saved


def _effort(map_: LinearMap) -> float:
    """Return how many entries a dense matrix may have that is multiplied as fast as a map, from one vector on."""
    if isinstance(map_, Sum | Product):
        return sum(_effort(part) for part in map_.maps) + (len(map_.maps) - 1) * NUMBERS_PER_CALL
    if isinstance(map_, Quantized | Interleaved):  # every call writes the matrix out
        return math.inf
    return (SPARSE_EFFORT if isinstance(map_, Bitmap) else 1) * map_.numbers + EXTRA_CALLS.get(
        type(map_), 0
    ) * NUMBERS_PER_CALL


def _is_current(decoding: _Decoding) -> bool:
    """Tell whether nothing changed since a dense weight was made; called for every token, hence so spelled out."""
    if (
        not decoding.holds
        or (decoding.buffer_version is not None and decoding.operand._version != decoding.buffer_version)
        or decoding.tensor._version != decoding.version
        or decoding.tensor.data_ptr() != decoding.address
        or decoding.tensor_2._version != decoding.version_2
        or decoding.tensor_2.data_ptr() != decoding.address_2
    ):
        return False
    for tensor, version, address in decoding.others:
        if tensor._version != version or tensor.data_ptr() != address:
            return False
    return True


def _has_changed_parts(decoding: _Decoding) -> bool:
    """Tell whether anything was set on a part past torch, in its `__dict__`; too slow a look for every token."""
    return any(len(attributes) != number for attributes, number in decoding.parts)


def _counting_along(tensor: Tensor, other: Tensor) -> Tensor | None:
    """Return a tensor with the memory of one and the version counter of another: a detached tensor shares the counter
    of its source, and keeps it when it gets other memory. None inside functional transforms, which forbid that.
    """
    counting = other.detach()
    try:
        counting.data = tensor
    except RuntimeError:  # what a transform makes must not outlive it
        return None
    return counting


def is_plain(leaf: nn.Module) -> bool:
    """Tell whether a leaf uses its weight as torch does and nothing else happens: not wrapped by an adapter or a
    quantizer, no hook that loads, gathers or records, no stand-in of a functional transform for its weight.
    """
    return (
        type(leaf) in (nn.Linear, nn.Embedding)
        and type(leaf._parameters.get("weight")) is nn.Parameter
        and is_untouched(leaf)
    )


def is_untouched(module: nn.Module) -> bool:
    """Tell whether a module does what its class says and nothing besides: no hooks, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
