"""Moments and gradients of the layers of a model that is in memory, from batches as its training loop has them."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.progress import Progress, silent
from eckart.stats.moments import Moments, MomentSum, WeightGradientSum
from eckart.stats.streaming import hooked

# What a model is called with: token ids (b, t), or its keyword arguments.
Batch = Tensor | Mapping[str, Any]


@torch.no_grad()
def live_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch], progress: Progress = silent
) -> dict[str, Moments]:
    """Return the moments of the inputs of layers; those called with one tensor share one object.

    Padding, as an `attention_mask` tells it, counts for nothing.

    Args:
        model: any model; put into evaluation mode for the pass.
        layers: layers by name.
        batches: what the model is called with.
        progress: told of the stage "statistics".

    Raises:
        EckartError: if there are no batches, a layer is never called, or its inputs hold NaN or Inf.
    """
    sums, headless = _MomentSums(), _runs_headless(model, layers)
    with _evaluating(model):
        for i, batch in enumerate(batches):
            progress("statistics", i, i + 1)
            keyword = _keywords(model, batch)
            if headless:
                keyword = {k: v for k, v in keyword.items() if k != "labels"} | {"logits_to_keep": 1}
            with sums.adding(layers, keyword.get("attention_mask")):
                model(**keyword)
    return sums.results(layers)


def _runs_headless(model: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Return whether all layers are inside a model's body and its head can be spared all tokens but the last."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    return "logits_to_keep" in inspect.signature(model.forward).parameters and all(n.startswith(body) for n in layers)


class _MomentSums:
    """Sums for the moments of the inputs of layers, one for those called with one tensor."""

    def __init__(self) -> None:
        self._sums: dict[str, MomentSum] = {}
        self._owner: dict[str, str] = {}

    @contextmanager
    def adding(self, layers: Mapping[str, nn.Module], mask: Any) -> Iterator[None]:
        """Add what the layers see in one call of the model, but for padding."""
        seen: dict[int, tuple[Tensor, str]] = {}  # holds the tensors, so that no identity is reused

        def see(name: str, x: Tensor) -> None:
            first = seen.setdefault(id(x), (x, name))[1]
            if self._owner.setdefault(name, first) == name:
                self._sums.setdefault(name, MomentSum(x.shape[-1], x.device)).add(_unpadded(x.detach(), mask))

        with hooked(dict(layers), see):
            yield

    def results(self, layers: Mapping[str, nn.Module]) -> dict[str, Moments]:
        """Return the moments of every layer, the same object for those that share them."""
        _require_seen(layers, self._owner)
        found = {name: total.result(name) for name, total in self._sums.items()}
        return {name: found[self._owner[name]] for name in layers}


def live_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch], progress: Progress = silent
) -> dict[str, Tensor]:
    """Return the mean gradient of the model's loss by the weight of every layer, (m, n) float32, in one pass.

    No parameter needs to require gradients, and none gets one: the gradients are formed layer by layer as autograd
    passes.

    Args:
        model: a model whose output has a `loss`; token ids without labels are their own labels.
        layers: layers by name.
        batches: what the model is called with.
        progress: told of the stage "gradients".

    Raises:
        EckartError: if there are no batches, the model returns no loss, or a layer is never reached.
    """
    sums: dict[str, WeightGradientSum] = {}
    with _evaluating(model), _summed_gradients(model, layers, sums):
        for i, batch in enumerate(batches):
            progress("gradients", i, i + 1)
            _backward(model, _keywords(model, batch))
    _require_seen(layers, {name: name for name in sums})
    return {name: sums[name].result(name) for name in layers}


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one pass over data says of the layers of a model, by name.

    Attributes:
        moments: of their inputs; layers that see one tensor share one object.
        gradients: mean gradient of the loss by their weights, (m, n).
    """

    moments: Mapping[str, Moments]
    gradients: Mapping[str, Tensor]


def live_statistics(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch], progress: Progress = silent
) -> Statistics:
    """Return what `live_moments` and `live_gradients` do, from one pass forward and backward.

    Args:
        model: a model whose output has a `loss`; token ids without labels are their own labels.
        layers: layers by name.
        batches: what the model is called with.
        progress: told of the stage "gradients".

    Raises:
        EckartError: as those two do.
    """
    moments, sums = _MomentSums(), dict[str, WeightGradientSum]()
    with _evaluating(model), _summed_gradients(model, layers, sums):
        for i, batch in enumerate(batches):
            progress("gradients", i, i + 1)
            keyword = _keywords(model, batch)
            with moments.adding(layers, keyword.get("attention_mask")):
                _backward(model, keyword)
    return Statistics(moments.results(layers), {name: sums[name].result(name) for name in layers})


def _backward(model: nn.Module, keyword: dict[str, Any]) -> None:
    """Run the model and the gradients of its loss."""
    if "labels" not in keyword:
        keyword["labels"] = keyword["input_ids"]
    loss = getattr(model(**keyword), "loss", None)
    if loss is None:
        raise EckartError(f"{type(model).__name__} returned no loss; give batches with labels it knows")
    loss.backward()


@contextmanager
def _summed_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], sums: dict[str, WeightGradientSum]
) -> Iterator[None]:
    def hook(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            x = args[0].detach()
            total = sums.setdefault(name, WeightGradientSum())
            out.register_hook(lambda g: total.add(x, g))

        return after

    required = {p: p.requires_grad for p in model.parameters()}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    for parameter in required:
        parameter.requires_grad_(False)
    # Something upstream has to require gradients for the layers' outputs to have any.
    handles.append(_first_embedding(model).register_forward_hook(lambda module, args, out: out.requires_grad_(True)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted)


def _first_embedding(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_input_embeddings", None)
    found = get() if get is not None else None
    if isinstance(found, nn.Module):
        return found
    raise EckartError(f"{type(model).__name__} has no input embeddings for gradients to start from")


def _keywords(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the keyword arguments of a call, tensors on the model's device."""
    if not isinstance(batch, Tensor | Mapping):
        raise EckartError(f"data= takes a list of batches, each a dict or a tensor of ids, got {batch!r:.40} in it")
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def _unpadded(x: Tensor, mask: Any) -> Tensor:
    """Return the vectors of x that stand for real tokens."""
    if isinstance(mask, Tensor) and mask.shape == x.shape[:-1] and not bool(mask.all()):
        return x[mask.bool()]
    return x


def _require_seen(layers: Mapping[str, nn.Module], seen: Mapping[str, str]) -> None:
    missed = [name for name in layers if name not in seen]
    if missed:
        raise EckartError(f"the batches never reached {missed[0]}; give data= at least one batch that uses every layer")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
