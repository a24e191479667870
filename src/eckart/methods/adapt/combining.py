"""Combining adapters of one model: the table of ways, and the changes they are made from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eckart.hosts import AdaptedHost, Adapter, map_of
from eckart.hosts.adapter import Plus
from eckart.maps import zero_map
from eckart.methods.adapt.combination import Combination, averaged, summed
from eckart.methods.adapt.task_masks import task_masks
from eckart.methods.adapt.ties import ties
from eckart.methods.pages import check_settings, page_named, signature_of

COMBINATIONS: dict[str, Callable[..., Combination]] = {
    "sum": summed,
    "mean": averaged,
    "ties": ties,
    "task-masks": task_masks,
}


def combination(how: str, settings: Mapping[str, Any]) -> Combination:
    """Return a way to combine with some settings changed.

    Raises:
        EckartError: for an unknown way or setting (with the nearest names), or a value of the wrong type or range.
    """
    page = page_named(COMBINATIONS, how)
    check_settings(how, signature_of(page), settings)
    return page(**settings)


def combined(layer: AdaptedHost, names: Sequence[str], way: Combination) -> list[Adapter]:
    """Return the adapters that a layer's are combined into, frozen: one, or one per name.

    Raises:
        EckartError: if one of them depends on its input, so that no matrix stands for it.
    """
    with torch.no_grad():
        maps = way.combine([_change(layer, name) for name in names])
    return [Adapter([Plus(made).requires_grad_(False)]) for made in maps]  # shared tensors stay shared


def _change(layer: AdaptedHost, name: str) -> Tensor:
    """Return f(W) - W of an adapter (m, n), zero where it is not on the layer; float32 or wider."""
    base = map_of(layer.base)
    wide = torch.promote_types(base.dtype, torch.float32)
    if name not in layer.adapters:
        return torch.zeros(base.shape, dtype=wide, device=base.device)
    adapter = layer.adapter(name)
    if all(isinstance(change, Plus) for change in adapter.chain()):  # without the rounding of W + D - W
        return adapter.of(zero_map(base.shape, wide).to(device=base.device)).dense()
    inner = base.to(wide)
    return adapter.of(inner).dense() - inner.dense()
