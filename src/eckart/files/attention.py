"""Adaptive-rank attention inside a transformers model, by its own attention interface, and in a file beside it.

The file holds, as safetensors, "<layer>.up" (h, d, d) and "<layer>.down" (h, d, d) of every attention layer and, of a
learned policy, "<layer>.weight" (2 (R - 1), R) and "<layer>.bias" (R,); its metadata says the format, the ranks and the
policy as JSON.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eckart.atomic import aligned, write_tensors
from eckart.errors import EckartError
from eckart.hosts.attention import BoundedRank, FixedRank, LearnedRank, Policy, RankGate
from eckart.maps import Gated

# The name under which transformers finds it, and the submodule of an attention layer that it asks.
NAME, CHILD = "eckart_adaptive", "eckart_rank"
KEY, LAYOUT = "eckart_attention", 1


def adaptive_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' "sdpa" does, with queries (b, heads, q, d) and keys (b, h, t, d) as the layer's gate
    gives them; a layer without a gate attends exactly.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    gate = module._modules.get(CHILD)
    if gate is not None:
        query, key = gate(query, key, scale)
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scale, **options
    )
    return out


def register() -> None:
    """Register with transformers; a second call changes nothing."""
    AttentionInterface.register(NAME, adaptive_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()


@dataclass(frozen=True, slots=True, eq=False)
class AdaptiveAttention:
    """The gates in a model.

    Attributes:
        model: the model.
        gates: gates by the name of their attention layer.
        former: the attention implementation the model had.
    """

    model: PreTrainedModel
    gates: Mapping[str, RankGate]
    former: str

    def mean_rank(self) -> float:
        """Return the mean share of the head dimension used since the last `reset`, over layers and calls; 1 of none."""
        calls = sum(gate.calls for gate in self.gates.values())
        used = sum(gate.total / gate.ranks[-1] for gate in self.gates.values())
        return used / calls if calls else 1.0

    def reset(self) -> None:
        """Start counting anew."""
        for gate in self.gates.values():
            gate.calls, gate.total = 0, 0

    def remove(self) -> None:
        """Make the model's attention what it was."""
        for name in self.gates:
            self.model.get_submodule(name)._modules.pop(CHILD, None)
        self.model.set_attn_implementation(self.former)

    def save(self, path: str | Path) -> None:
        """Write the gates, to be put into the same model by `load_attention`."""
        tensors: dict[str, Tensor] = {}
        policies: dict[str, dict[str, Any]] = {}
        for name, gate in self.gates.items():
            tensors |= {f"{name}.up": gate.map.up, f"{name}.down": gate.map.down}
            policies[name], more = _written(gate.policy)
            policies[name]["ranks"] = list(gate.ranks)
            tensors |= {f"{name}.{key}": tensor for key, tensor in more.items()}
        plain = {key: t.detach().float().cpu().contiguous() for key, t in tensors.items()}
        # One entry only: the order of several is drawn at random, and the bytes with it.
        write_tensors(Path(path), plain, {KEY: json.dumps({"format": LAYOUT, "layers": policies})})


def install(model: PreTrainedModel, gates: Mapping[str, RankGate]) -> AdaptiveAttention:
    """Put gates into attention layers by name and make the model use them.

    Raises:
        EckartError: if the model has no exchangeable attention, has gates already, or a gate does not fit its layer.
    """
    former = attention_of(model)
    for name, gate in gates.items():
        layer = _layer(model, name)
        width = getattr(layer, "head_dim", gate.ranks[-1])
        if width != gate.ranks[-1]:
            raise EckartError(f"the heads of {name} have {width} dimensions, but its gate is for {gate.ranks[-1]}")
    device = model.device
    for name, gate in gates.items():
        _layer(model, name).add_module(CHILD, gate.to(device))
    model.set_attn_implementation(NAME)
    return AdaptiveAttention(model, dict(gates), former)


def attention_of(model: PreTrainedModel) -> str:
    """Return the attention implementation of a model.

    Raises:
        EckartError: if it cannot be exchanged, or is adaptive already.
    """
    if not model._can_set_attn_implementation():
        raise EckartError(
            f"{type(model).__name__} does not use the attention interface of transformers, so its attention cannot be "
            "exchanged"
        )
    former = str(model.config._attn_implementation)
    if former == NAME:
        raise EckartError("the attention of this model is adaptive already; call remove() on what put it there first")
    return former


@contextmanager
def watched(model: PreTrainedModel, watches: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let modules see the queries and keys of attention layers by name, for a while."""
    former = attention_of(model)
    for name, watch in watches.items():
        _layer(model, name).add_module(CHILD, watch)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(former)
        for name in watches:
            _layer(model, name)._modules.pop(CHILD, None)


def load_attention(model: PreTrainedModel, path: str | Path) -> AdaptiveAttention:
    """Put the gates of a file into the model that they were fitted to.

    Raises:
        EckartError: if the file is missing, damaged, or of another model.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as handle:
            stated = json.loads((handle.metadata() or {})[KEY])
            tensors = {key: aligned(handle.get_tensor(key)) for key in handle.keys()}  # noqa: SIM118
        if stated["format"] != LAYOUT:
            raise EckartError(f"{path} has format {stated['format']}, but this version reads {LAYOUT}; update eckart")
        gates = {name: _gate(name, entry, tensors) for name, entry in stated["layers"].items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise EckartError(f"{path} is missing, damaged or holds no adaptive attention ({error})") from error
    return install(model, gates)


def _layer(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        layer: nn.Module = model.get_submodule(name)
    except AttributeError as error:
        raise EckartError(
            f"{type(model).__name__} has no attention layer {name!r}; the gates are of another model"
        ) from error
    return layer


def _written(policy: Policy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if isinstance(policy, FixedRank):
        return {"policy": "fixed", "index": policy.index}, {}
    if isinstance(policy, BoundedRank):
        return {"policy": "bound", "tolerance": policy.tolerance}, {}
    if isinstance(policy, LearnedRank):
        return {"policy": "learned"}, {"weight": policy.weight, "bias": policy.bias}
    raise EckartError(
        f"a policy of type {type(policy).__name__} cannot be saved; only fixed, bound and learned ones can"
    )


def _gate(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RankGate:
    map_ = Gated(tensors[f"{name}.up"], tensors[f"{name}.down"], tuple(int(rank) for rank in entry["ranks"]))
    count = len(map_.ranks)
    policy: Policy
    if entry["policy"] == "fixed":
        policy = FixedRank(range(count)[int(entry["index"])])
    elif entry["policy"] == "bound":
        policy = BoundedRank(float(entry["tolerance"]))
    elif entry["policy"] == "learned":
        policy = LearnedRank(tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        if policy.weight.shape != (2 * (count - 1), count) or policy.bias.shape != (count,):
            raise ValueError(f"the policy of {name} does not fit {count} ranks")
    else:
        raise ValueError(f"unknown policy {entry['policy']!r}")
    return RankGate(map_, policy)
