"""Small factored layers without gradients: a temporary dense weight where operator calls cost more than they save."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from eckart.hosts.base import Host
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


# What a temporary dense weight was made of, and all that would show a change of it. Plain tuples of the dictionaries
# themselves: attributes and named fields, looked up for every token, doubled the time of the check.
_Leaf = tuple[
    dict[str, Any],  # where the leaf is registered
    str,  # under this name
    nn.Module,
    dict[str, Any],  # its parameters
    Tensor,  # its weight
    int,  # the weight's version
    int,  # its address
    dict[int, Any],  # the leaf's hooks
    dict[int, Any],  # those called before it
    dict[str, Any],  # its own attributes, which a replaced `forward` joins
    int,  # how many they are: counting them looks at less memory than looking one up
]
_Own = tuple[dict[str, Any], str, Tensor, int]  # a tensor of the host itself: registered where and as what, its version
# A host inside the host, whose tensors are among those above: registered where and as what, the hooks, its attributes.
_Inner = tuple[dict[str, Any], str, nn.Module, dict[int, Any], dict[int, Any], dict[str, Any], int]
# What it was made of, the weight, where the bias is registered, and the weight transposed: multiplying by that view is
# what `F.linear` does after making it, for every token.
_Decoding = tuple[tuple[_Leaf, ...], tuple[_Own, ...], Tensor, dict[str, Any], Tensor, tuple[_Inner, ...]]


class TemporaryDense(nn.Module):
    """A module with a structured matrix that can also be had as a temporary dense weight.

    The weight is made when first asked for. It is forgotten with every call with gradients, every change of mode, dtype
    or device, and whenever a factor is replaced or written to in place. Only a write through `.data` leaves no trace;
    call `train()` or `eval()` after one.
    """

    _decoding: _Decoding | None = None

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the matrix as a new tensor."""

    def temporary_dense(self) -> Tensor | None:
        """Return the temporary dense weight, made anew if any factor changed; None where factors must be called."""
        decoding = self._decoding
        if decoding is None or not _is_current(decoding):
            decoding = self._decoding = self._decoded()
        return None if decoding is None else decoding[2]

    def forget(self) -> None:
        """Free the temporary dense weight."""
        self._decoding = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the temporary dense weight is forgotten."""
        self._decoding = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the temporary dense weight out of copies."""
        return {**self.__dict__, "_decoding": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What every move and cast of a module goes through; it may leave identity and version of a parameter alone.
        self._decoding = None
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    @property
    def bias_owner(self) -> nn.Module:
        """The module whose parameter the bias is."""
        return self

    def _decoded(self) -> _Decoding | None:
        """Return a temporary dense weight and what it was made of; None where the factors must be called."""
        if "forward" in self.__dict__:  # replaced by one that may do anything besides
            return None
        state = self._state()
        if state is None:
            return None
        leaves, held, inner = state
        with torch.autocast("cpu", enabled=False):  # the weight may outlive the region it is made in
            dense = self.dense().detach()
        return tuple(leaves), tuple(held), dense, self.bias_owner._parameters, dense.t(), tuple(inner)

    def _state(self) -> tuple[list[_Leaf], list[_Own], list[_Inner]] | None:
        """Return all that would show a change of the matrix; None where parts do anything else besides."""
        leaves: list[_Leaf] = []
        inner: list[_Inner] = []
        held = self._tensors()
        if any(tensor.is_inference() for _, _, tensor, _ in held):  # those do not count their versions
            return None
        for name, part in self._modules.items():
            if isinstance(part, TemporaryDense) and is_untouched(part) and part.bias_owner._parameters["bias"] is None:
                below = part._state()
                if below is None:
                    return None
                attributes, hooks = part.__dict__, (part._forward_hooks, part._forward_pre_hooks)
                inner += [(self._modules, name, part, *hooks, attributes, len(attributes)), *below[2]]
                leaves, held = leaves + below[0], held + below[1]
                continue
            if part is None or not is_plain(part):
                return None
            if part is not self.bias_owner and part._parameters.get("bias") is not None:
                return None
            weight = cast(Tensor, part._parameters["weight"])
            if weight.is_inference():
                return None
            own, store, hooks = part.__dict__, part._parameters, (part._forward_hooks, part._forward_pre_hooks)
            state = weight._version, weight.data_ptr()
            leaves.append((self._modules, name, part, store, weight, *state, *hooks, own, len(own)))
        return leaves, held, inner

    def _tensors(self) -> list[_Own]:
        """Return the tensors registered with the module itself, but the bias."""
        return [
            (registered, name, tensor, 0 if tensor.is_inference() else tensor._version)
            for registered in (self._buffers, self._parameters)
            for name, tensor in registered.items()
            if tensor is not None and name != "bias"
        ]


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
            or torch.is_grad_enabled()
            or type(x) is not Tensor
            or x.numel() >= self._dense_below
            or self._forward_hooks
            or self._forward_pre_hooks
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch.compiler.is_compiling()
            or not _is_current(decoding)
        ):
            return cast(Tensor, super().__call__(x))
        bias = decoding[3]["bias"]
        return torch.matmul(x, decoding[4]) if bias is None else F.linear(x, decoding[2], bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; `__call__` goes past a `forward` of its own only until it has one."""
        super().__setattr__(name, value)
        if name == "forward":
            self._decoding = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis: x (..., n) -> (..., m)."""
        if torch.is_grad_enabled():
            self._decoding = None
            return self.structured(x)
        if x.numel() >= self._dense_below or not x.is_cpu or torch.compiler.is_compiling():
            return self.structured(x)
        weight = self.temporary_dense()
        return self.structured(x) if weight is None else F.linear(x, weight, self.offset)

    def kept_table(self, ids: Tensor) -> Tensor | None:
        """Return the temporary dense weight to look rows up in, None where the structure is to be asked."""
        if torch.is_grad_enabled():
            self._decoding = None
            return None
        return (
            self.temporary_dense() if self._dense_below and ids.is_cpu and not torch.compiler.is_compiling() else None
        )

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
    for registered, name, tensor, version in decoding[1]:
        if registered[name] is not tensor or tensor._version != version:
            return False
    for owner, name, leaf, store, weight, version, pointer, hooks, pre_hooks, attributes, count in decoding[0]:
        if (
            owner[name] is not leaf
            or store["weight"] is not weight
            or weight._version != version
            or weight.data_ptr() != pointer
            or hooks
            or pre_hooks
            or len(attributes) != count
        ):
            return False
    for owner, name, module, hooks, pre_hooks, attributes, count in decoding[5]:
        if owner[name] is not module or hooks or pre_hooks or len(attributes) != count:
            return False
    return True


def is_plain(leaf: nn.Module) -> bool:
    """Tell whether a leaf uses its weight as torch does and nothing else happens: not wrapped by an adapter or a
    quantizer, no hook that loads, gathers or records, no stand-in of a functional transform for its weight.
    """
    return (
        type(leaf) in (nn.Linear, nn.Embedding)
        and type(leaf._parameters["weight"]) is nn.Parameter
        and is_untouched(leaf)
    )


def is_untouched(module: nn.Module) -> bool:
    """Tell whether a module does what its class says and nothing besides: no hooks, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
