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
from eckart.maps import LinearMap, LowRank, Pivoted

# A factored layer makes this many more operator calls than a dense one.
EXTRA_CALLS = {LowRank: 1, Pivoted: 3}
# One more call costs as much as reading this many float32 numbers for one vector, or as this many multiplications for
# many vectors, on CPU (benchmarks/constants.py). Pivots never win with many vectors on layers as small as that:
# reordering them takes as long as multiplying.
NUMBERS_PER_CALL = 60_000
MULTIPLICATIONS_PER_CALL = 4_000_000
# Thin factors multiply at a lower rate than a square matrix, so that saving less than this share saves no time.
LEAST_SAVING = 0.25


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
        leaves: list[_Leaf] = []
        inner: list[_Inner] = []
        held = self._tensors()
        for name, leaf in self._modules.items():
            if isinstance(leaf, TemporaryDense) and not leaf._modules and is_untouched(leaf):
                own, hooks = leaf.__dict__, (leaf._forward_hooks, leaf._forward_pre_hooks)
                inner.append((self._modules, name, leaf, *hooks, own, len(own)))
                held += leaf._tensors()
                continue
            if leaf is None or not is_plain(leaf):
                return None
            weight = cast(Tensor, leaf._parameters["weight"])
            if weight.is_inference():
                return None
            own, store, hooks = leaf.__dict__, leaf._parameters, (leaf._forward_hooks, leaf._forward_pre_hooks)
            state = weight._version, weight.data_ptr()
            leaves.append((self._modules, name, leaf, store, weight, *state, *hooks, own, len(own)))
        if any(tensor.is_inference() for _, _, tensor, _ in held):  # those do not count their versions
            return None
        with torch.autocast("cpu", enabled=False):  # the weight may outlive the region it is made in
            weight = self.dense().detach()
        return tuple(leaves), tuple(held), weight, self.bias_owner._parameters, weight.t(), tuple(inner)

    def _tensors(self) -> list[_Own]:
        """Return the tensors registered with the module itself, but the bias."""
        return [
            (registered, name, tensor, 0 if tensor.is_inference() else tensor._version)
            for registered in (self._buffers, self._parameters)
            for name, tensor in registered.items()
            if tensor is not None and name != "bias"
        ]


class DecodingHost(Host, TemporaryDense):
    """A host that computes with a temporary dense weight where that is faster than its factors."""

    def __init__(self, shape: tuple[int, int], map_type: type[LinearMap], numbers: int) -> None:
        super().__init__(shape)
        self._dense_below = shape[1] * _dense_below(shape, map_type, numbers)

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

    @abstractmethod
    def structured(self, x: Tensor) -> Tensor:
        """Apply through the factors."""


def _dense_below(shape: tuple[int, int], map_type: type[LinearMap], numbers: int) -> float:
    """Return the number of vectors from which on a layer's factors are faster than its dense weight, 0 if always."""
    full, calls = math.prod(shape), EXTRA_CALLS[map_type]
    saved = full - numbers
    if saved >= calls * NUMBERS_PER_CALL:
        return 0
    if map_type is Pivoted or saved <= LEAST_SAVING * full:
        return math.inf
    return calls * MULTIPLICATIONS_PER_CALL / saved


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
