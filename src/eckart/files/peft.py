"""The folder that the PEFT library saves an adapter in: read and written without that library.

    adapter_config.json          peft_type, target_modules, and the settings of the type
    adapter_model.safetensors    "base_model.model.<layer>.<tensor>"; modules_to_save as "base_model.model.<parameter>"

Read and written are four types, with s = alpha / r, or alpha / sqrt(r) under use_rslora:

    LORA   W + s B A           lora_A.weight (r, n), lora_B.weight (m, r); use_dora: lora_magnitude_vector (m,)
    MISS   W + [D D ... D]     miss_block (r, m), that is D^T
    HRA    W H_1 ... H_r       hra_u (n, r), a column for each reflection
    OFT    W blockdiag(R_i)    oft_R.weight (b, s (s - 1) / 2), R_i the exact Cayley transform

Whatever else a config asks for is refused: a tensor read by other rules than it was trained with gives wrong outputs,
not errors. What only concerns starts and searches is passed over, save the starts that change the base itself.

Source: the format of PEFT 0.21.2 (huggingface/peft, src/peft/utils/save_and_load.py and the layers of each type).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from eckart.atomic import appearing, check_output, read_json, write_json, write_tensors
from eckart.errors import EckartError
from eckart.files.adapters import DAMAGED, read_tensors

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LORA, MISS, HRA, OFT = "LORA", "MISS", "HRA", "OFT"
# The tensors of a layer by type: those it must have, then those it may have.
OWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    LORA: (("lora_A.weight", "lora_B.weight"), ("lora_magnitude_vector",)),
    MISS: (("miss_block",), ()),
    HRA: (("hra_u",), ()),
    OFT: (("oft_R.weight",), ()),
}
# Keys that say nothing about what a saved adapter computes, or whose meaning is taken from tensors or read by name.
PASSED_OVER = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eps", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "init_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "mini_r", "miss_dropout",
    "modules_to_save", "num_cayley_neumann_terms", "oft_block_size", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_cayley_neumann",
    "use_dora", "use_rslora",
})  # fmt: skip
# Starts of LoRA that leave the base as it is.
STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as PEFT saves it.

    Attributes:
        kind: "LORA", "MISS", "HRA" or "OFT".
        layers: tensors of each adapted layer by the last part of their names, by layer.
        alphas: scale of each layer times its rank, of LORA alone.
        dropout: share of the inputs that is dropped in training, of LORA and MISS.
        modules: what modules_to_save names; each is the end of a module's name.
        trained: tensors of those modules, by full name.
        rank: r of the config as read.
        alpha: lora_alpha of the config as read.
        rank_stabilized: whether the config read divides alpha by the root of the rank.
    """

    kind: str
    layers: dict[str, dict[str, Tensor]]
    alphas: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    modules: tuple[str, ...] = ()
    trained: dict[str, Tensor] = field(default_factory=dict)
    rank: int = 0
    alpha: float = 0.0
    rank_stabilized: bool = False

    def scale(self, layer: str) -> float:
        """Return s of a layer."""
        return self.alphas[layer] / self.layers[layer]["lora_A.weight"].shape[0]

    @property
    def has_magnitudes(self) -> bool:
        """Whether rows are rescaled."""
        return any("lora_magnitude_vector" in tensors for tensors in self.layers.values())


def write_peft(
    folder: Path,
    adapter: PeftAdapter,
    modules: Iterable[str],
    *,
    base: str | None = None,
    causal: bool = False,
    transposed: bool = False,
) -> None:
    """Write the folder of an adapter, whole or not at all.

    Args:
        folder: where; must not hold anything yet.
        adapter: what is written; ranks, block sizes and tiles must be those the type allows.
        modules: names of all modules of the base, for the shortest names that mean the adapted layers alone.
        base: name of the base model, as PEFT keeps it.
        causal: whether it is a causal language model.
        transposed: whether the adapted layers store their weights as (in, out).

    Raises:
        EckartError: if the folder holds something already or cannot be written.
    """
    check_output(folder)
    config = {
        "peft_type": adapter.kind,
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if causal else None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": _targets(list(adapter.layers), modules),
        "modules_to_save": list(adapter.modules) or None,
        **_settings(adapter, transposed),
    }
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in adapter.trained.items()}
    for layer, own in adapter.layers.items():
        tensors.update({f"{PREFIX}{layer}.{key}": tensor for key, tensor in own.items()})
    with appearing(folder) as temporary:
        write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / CONFIG, config)


def _settings(adapter: PeftAdapter, transposed: bool) -> dict[str, Any]:
    """Return what the config of a type says beside what all have."""
    first = next(iter(adapter.layers.values()))
    match adapter.kind:
        case "MISS":
            rank = first["miss_block"].shape[0]
            return {"r": rank, "miss_dropout": adapter.dropout, "init_weights": True}
        case "HRA":
            return {"r": first["hra_u"].shape[1], "apply_GS": False}
        case "OFT":
            exact = {"use_cayley_neumann": False, "coft": False, "block_share": False}
            return {"r": 0, "oft_block_size": block_size(first["oft_R.weight"]), **exact}
    ranks = {layer: int(own["lora_A.weight"].shape[0]) for layer, own in adapter.layers.items()}
    alphas = {layer: _plain(alpha) for layer, alpha in adapter.alphas.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.has_magnitudes,
        "use_rslora": False,
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        # An anchor, since PEFT would take a name for the end of another one as well.
        "rank_pattern": {f"^{layer}": r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{layer}": a for layer, a in alphas.items() if a != alpha},
    }


def _plain(number: float) -> float | int:
    """Return a whole number as one, rounding undone."""
    near = round(number)
    return near if math.isclose(number, near, rel_tol=1e-12) else number


def _commonest(values: Iterable[Any]) -> Any:
    counted = list(values)
    return max(counted, key=counted.count)


def _targets(layers: list[str], modules: Iterable[str]) -> list[str] | str:
    """Return the last parts of the layers' names if they mean no other module, else an expression for them."""
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    meant = {module for module in modules if module.rpartition(".")[2] in ends}
    return ends if meant == set(layers) else "|".join(re.escape(layer) for layer in layers)


def block_size(skew: Tensor) -> int:
    """Return s of the entries of s x s skew-symmetric matrices, (b, s (s - 1) / 2)."""
    return (1 + math.isqrt(1 + 8 * skew.shape[1])) // 2


def read_peft(folder: Path) -> PeftAdapter:
    """Read a folder that PEFT wrote; tensors keep their dtypes.

    Raises:
        EckartError: if it is damaged, or holds what is not read: other types and variants, pickles.
    """
    config = read_json(folder / CONFIG)
    kind = str(config.get("peft_type"))
    _check_config(folder, kind, config)
    if not (folder / TENSORS).is_file() and (folder / PICKLE).is_file():
        raise EckartError(f"{folder / PICKLE} is a pickle, which can run code; save it as {TENSORS} with PEFT first")
    layers, rest = _split(folder, kind, read_tensors(folder / TENSORS))
    try:
        modules = tuple(str(name) for name in config.get("modules_to_save") or ())
        dropout = float(config.get({LORA: "lora_dropout", MISS: "miss_dropout"}.get(kind, ""), 0.0))
        rank, alpha = int(config.get("r", 8) or 0), float(config.get("lora_alpha", 8))
        alphas = {layer: _alpha(layer, own, config) for layer, own in layers.items()} if kind == LORA else {}
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout}")
    except (re.error, *DAMAGED) as error:
        raise EckartError(f"{folder / CONFIG} is damaged ({error}); copy the folder again") from error
    dora = kind == LORA and bool(config.get("use_dora"))
    for layer, own in layers.items():
        if kind == LORA and ("lora_magnitude_vector" in own) != dora:
            raise EckartError(f"use_dora is {dora} in {folder / CONFIG}, which the tensors of {layer} do not fit")
    rank_stabilized = bool(config.get("use_rslora"))
    return PeftAdapter(kind, layers, alphas, dropout, modules, rest, rank, alpha, rank_stabilized)


def _check_config(folder: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Refuse what a config asks for that is not read."""
    if kind not in OWN:
        raise EckartError(f"{folder} holds an adapter of PEFT's type {kind}; eckart reads {', '.join(OWN)}")
    start = config.get("init_lora_weights", True)
    if kind == LORA and start not in STARTS:
        raise EckartError(
            f"{folder} was trained from init_lora_weights={start!r}, which changes the base; save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    variant = config.get("init_weights", True)
    if kind == MISS and not isinstance(variant, bool):
        raise EckartError(f"{folder} holds MiSS with init_weights={variant!r}; eckart reads the plain one alone")
    if kind == OFT and config.get("use_cayley_neumann", True):
        raise EckartError(
            f"{folder} holds OFT with use_cayley_neumann, a cut series; eckart reads exact rotations alone"
        )
    for key, value in config.items():
        if key not in PASSED_OVER and value and value != "none":
            raise EckartError(f"{folder / CONFIG} says {key}={value!r}, which eckart cannot express; train without it")


def _split(
    folder: Path, kind: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the tensors by layer, and the others by full name."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    needed, possible = OWN[kind]
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise EckartError(f"{folder / TENSORS} holds {name}, which is not named as PEFT names tensors of a model")
        name = name.removeprefix(PREFIX)
        own = next((key for key in (*needed, *possible) if name.endswith(f".{key}")), None)
        if own is None:
            rest[name] = tensor
        elif tensor.ndim != (1 if own in possible else 2):
            raise EckartError(f"{PREFIX}{name} has the shape {tuple(tensor.shape)}, which no linear layer's tensor has")
        else:
            layers.setdefault(name.removesuffix(f".{own}"), {})[own] = tensor
    for layer, found in layers.items():
        lacking = next((key for key in needed if key not in found), None)
        if lacking is not None:
            raise EckartError(f"{folder / TENSORS} lacks {PREFIX}{layer}.{lacking}; copy the folder again")
    if not layers:
        raise EckartError(f"{folder / TENSORS} adapts no linear layer with {kind}; eckart reads nothing else")
    return layers, rest


def _alpha(layer: str, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
    """Return the scale of a layer times its rank.

    Raises:
        ValueError: if its rank is not what the config says.
    """
    found = own["lora_A.weight"].shape[0]
    rank = int(_by_pattern(config.get("rank_pattern") or {}, layer, config.get("r", 8)))
    if rank != found or rank < 1:
        raise ValueError(f"{layer} has rank {found}, but the config says {rank}")
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, layer, config.get("lora_alpha", 8)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return the value of the first expression that the end of a layer's name matches."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
