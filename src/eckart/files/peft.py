"""The folder that the PEFT library saves an adapter in: read and written without that library.

    adapter_config.json          peft_type, target_modules, and the settings of the type
    adapter_model.safetensors    "base_model.model.<layer>.<tensor>"; modules_to_save as "base_model.model.<parameter>"

Read and written are these types, with s = alpha / r, or alpha / sqrt(r) under use_rslora:

    LORA   W + s B A               lora_A.weight (r, n), lora_B.weight (m, r); use_dora: lora_magnitude_vector (m,)
    MISS   W + [D D ... D]         miss_block (r, m), that is D^T
    HRA    W H_1 ... H_r           hra_u (n, r), a column for each reflection
    OFT    W blockdiag(R_i)        oft_R.weight (b, s (s - 1) / 2), R_i the exact Cayley transform
    LOKR   W + s C (x) D           lokr_w1 C, or its factors lokr_w1_a, lokr_w1_b; lokr_w2 D likewise
    LOHA   W + s (B1 A1) * (B2 A2) hada_w1_a B1 (m, r), hada_w1_b A1 (r, n), hada_w2_a, hada_w2_b
    HIRA   W + W * (B A)           hira_A (r, n), hira_B (m, r)
    IA3    diag(l) W or W diag(l)  ia3_l (m, 1) or (1, n)
    SHIRA  W + P                   shira_weight (k (m + n),), shira_indices (2, k (m + n)): rows, columns
    VERA   W + diag(b) B diag(d) A vera_lambda_b (m,), vera_lambda_d (r,); base_model.vera_A, base_model.vera_B of the
                                   widest layer, whose first columns and rows are A and B; read alone

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
LOKR, LOHA, HIRA, IA3, SHIRA, VERA = "LOKR", "LOHA", "HIRA", "IA3", "SHIRA", "VERA"
# The tensors of a layer by type, with how many axes each has.
OWN: dict[str, dict[str, int]] = {
    LORA: {"lora_A.weight": 2, "lora_B.weight": 2, "lora_magnitude_vector": 1},
    MISS: {"miss_block": 2},
    HRA: {"hra_u": 2},
    OFT: {"oft_R.weight": 2},
    LOKR: {"lokr_w1": 2, "lokr_w1_a": 2, "lokr_w1_b": 2, "lokr_w2": 2, "lokr_w2_a": 2, "lokr_w2_b": 2},
    LOHA: {"hada_w1_a": 2, "hada_w1_b": 2, "hada_w2_a": 2, "hada_w2_b": 2},
    HIRA: {"hira_A": 2, "hira_B": 2},
    IA3: {"ia3_l": 2},
    SHIRA: {"shira_weight": 1, "shira_indices": 2},
    VERA: {"vera_lambda_b": 1, "vera_lambda_d": 1},
}
# Tensors that all layers of a type share.
SHARED = {VERA: ("vera_A", "vera_B")}
# Keys that say nothing about what a saved adapter computes, or whose meaning is taken from tensors or read by name.
PASSED_OVER = frozenset({
    "alpha", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "d_initial",
    "decompose_both", "decompose_factor", "eps", "eva_config", "exclude_modules", "fan_in_fan_out",
    "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights", "init_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "mask_type", "megatron_core", "mini_r", "miss_dropout", "modules_to_save", "num_cayley_neumann_terms",
    "oft_block_size", "peft_type", "peft_version", "projection_prng_key", "qalora_group_size", "r", "random_seed",
    "rank_dropout_scale", "rank_pattern", "revision", "runtime_config", "save_projection", "target_modules",
    "task_type", "use_cayley_neumann", "use_dora", "use_effective_conv2d", "use_rslora", "vera_dropout",
})  # fmt: skip
# What a type calls the share of its inputs that is dropped.
DROPOUT = {LORA: "lora_dropout", MISS: "miss_dropout", VERA: "vera_dropout"}
# Starts of LoRA that leave the base as it is.
STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as PEFT saves it.

    Attributes:
        kind: the type, one of `OWN`.
        layers: tensors of each adapted layer by the last part of their names, by layer.
        alphas: scale of each layer times its rank, of LORA, LOKR and LOHA.
        dropout: share of the inputs that is dropped in training, of LORA, MISS and VERA.
        modules: what modules_to_save names; each is the end of a module's name.
        trained: tensors of those modules, by full name.
        rank: r of the config as read.
        alpha: lora_alpha of the config as read.
        rank_stabilized: whether the config read divides alpha by the root of the rank.
        ranks: r of each layer, of LOKR, which its tensors do not tell, and of SHIRA.
        shared: tensors that all layers share.
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
    ranks: dict[str, int] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def scale(self, layer: str) -> float:
        """Return s of a layer."""
        return self.alphas[layer] / self.rank_of(layer)

    def rank_of(self, layer: str) -> int:
        """Return r of a layer."""
        return self.ranks[layer] if layer in self.ranks else rank_of(self.kind, self.layers[layer])

    @property
    def has_magnitudes(self) -> bool:
        """Whether rows are rescaled."""
        return any("lora_magnitude_vector" in tensors for tensors in self.layers.values())


def rank_of(kind: str, own: Mapping[str, Tensor]) -> int:
    """Return the rank that the tensors of a layer tell, 0 if they tell none."""
    name = {LORA: "lora_A.weight", MISS: "miss_block", LOHA: "hada_w1_b", HIRA: "hira_A", VERA: "vera_lambda_d"}.get(
        kind
    )
    return int(own["hra_u"].shape[1]) if kind == HRA else int(own[name].shape[0]) if name else 0


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
        **({"bias": "none"} if adapter.kind in (LORA, MISS, HRA, OFT) else {}),
        "target_modules": _targets(list(adapter.layers), modules),
        "modules_to_save": list(adapter.modules) or None,
        **_settings(adapter, transposed),
    }
    if adapter.kind == IA3:
        config.update(_ia3_targets(adapter, config["target_modules"]))
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
            return {"r": rank_of(MISS, first), "miss_dropout": adapter.dropout, "init_weights": True}
        case "HRA":
            return {"r": rank_of(HRA, first), "apply_GS": False}
        case "OFT":
            exact = {"use_cayley_neumann": False, "coft": False, "block_share": False}
            return {"r": 0, "oft_block_size": block_size(first["oft_R.weight"]), **exact}
        case "IA3":
            return {"fan_in_fan_out": False}
        case "SHIRA":
            return {"r": next(iter(adapter.ranks.values())), "mask_type": "random", "fan_in_fan_out": False}
    ranks = {layer: adapter.rank_of(layer) for layer in adapter.layers}
    alphas = {layer: _plain(alpha) for layer, alpha in adapter.alphas.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values()) if alphas else None
    # An anchor, since PEFT would take a name for the end of another one as well.
    rank_pattern = {f"^{layer}": r for layer, r in ranks.items() if r != rank}
    alpha_pattern = {f"^{layer}": a for layer, a in alphas.items() if a != alpha}
    if adapter.kind == HIRA:
        return {"r": rank, "rank_pattern": rank_pattern, "hira_dropout": 0.0, "fan_in_fan_out": False}
    common = {"r": rank, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    if adapter.kind == LOHA:
        return {**common, "alpha": alpha}
    if adapter.kind == LOKR:
        return {**common, "alpha": alpha, "decompose_both": False, "decompose_factor": lokr_factor(adapter)}
    return {
        **common,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.has_magnitudes,
        "use_rslora": False,
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
    }


def lokr_factor(adapter: PeftAdapter) -> int:
    """Return the decompose_factor from which PEFT finds the sizes of all factors of LOKR, whole ones.

    Raises:
        EckartError: if there is none.
    """
    wanted = []
    for own in adapter.layers.values():
        wanted += list(zip(own["lokr_w1"].shape, own["lokr_w2"].shape, strict=True))
    for factor in (-1, *sorted({left for left, _ in wanted}, reverse=True)):
        if all(_divided(left * right, factor) == (left, right) for left, right in wanted):
            return factor
    raise EckartError(
        "PEFT chooses the sizes of Kronecker factors by one rule for all layers, which these do not follow; "
        'save it with format="eckart"'
    )


def _divided(size: int, factor: int) -> tuple[int, int]:
    """Return the sizes of the two factors of LOKR along a side of a layer, as PEFT chooses them."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), size if factor == -1 else factor)
    small = next(d for d in range(most, 0, -1) if size % d == 0)
    return small, size // small


def _ia3_targets(adapter: PeftAdapter, targets: list[str] | str) -> dict[str, list[str] | str]:
    """Return which layers IA3 adapts, and at the inputs of which, so that no name means layers of both kinds."""
    inputs = [layer for layer, own in adapter.layers.items() if own["ia3_l"].shape[0] == 1]
    ends, others = ({name.rpartition(".")[2] for name in names} for names in (inputs, adapter.layers.keys() - inputs))
    if isinstance(targets, list) and not ends & others:
        return {"target_modules": targets, "feedforward_modules": sorted(ends)}
    every, some = ("|".join(re.escape(name) for name in names) for names in (adapter.layers, inputs))
    return {"target_modules": every, "feedforward_modules": some}


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
    layers, rest, shared = _split(folder, kind, read_tensors(folder / TENSORS))
    try:
        modules = tuple(str(name) for name in config.get("modules_to_save") or ())
        dropout = float(config.get(DROPOUT.get(kind, ""), 0.0))
        rank, alpha = int(config.get("r", 8) or 0), float(config.get("lora_alpha" if kind == LORA else "alpha", 8))
        scaled = layers if kind in (LORA, LOKR, LOHA) else {}
        ranks = {layer: _rank(layer, kind, own, config) for layer, own in scaled.items()}
        alphas = {layer: _alpha(layer, ranks[layer], kind, config) for layer in scaled}
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout}")
    except (re.error, *DAMAGED) as error:
        raise EckartError(f"{folder / CONFIG} is damaged ({error}); copy the folder again") from error
    dora = kind == LORA and bool(config.get("use_dora"))
    for layer, own in layers.items():
        if kind == LORA and ("lora_magnitude_vector" in own) != dora:
            raise EckartError(f"use_dora is {dora} in {folder / CONFIG}, which the tensors of {layer} do not fit")
    rank_stabilized = bool(config.get("use_rslora"))
    known = ranks if kind == LOKR else {}
    return PeftAdapter(kind, layers, alphas, dropout, modules, rest, rank, alpha, rank_stabilized, known, shared)


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
    if kind == VERA and not config.get("save_projection", True):
        raise EckartError(
            f"{folder} holds VERA without its random matrices; save it with save_projection=True, which keeps them"
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
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors by layer, the others by full name, and those that all layers share."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        common = name.removeprefix("base_model.")
        if common in SHARED.get(kind, ()):
            shared[common] = tensor
            continue
        if not name.startswith(PREFIX):
            raise EckartError(f"{folder / TENSORS} holds {name}, which is not named as PEFT names tensors of a model")
        name = name.removeprefix(PREFIX)
        own = next((key for key in OWN[kind] if name.endswith(f".{key}")), None)
        if own is None:
            rest[name] = tensor
        elif tensor.ndim != OWN[kind][own]:
            raise EckartError(f"{PREFIX}{name} has the shape {tuple(tensor.shape)}, which no linear layer's tensor has")
        else:
            layers.setdefault(name.removesuffix(f".{own}"), {})[own] = tensor
    lacking = next((f"base_model.{key}" for key in SHARED.get(kind, ()) if key not in shared), None)
    for layer, found in layers.items():
        lacking = lacking or next((f"{PREFIX}{layer}.{key}" for key in _needed(kind, found) if key not in found), None)
    if lacking is not None:
        raise EckartError(f"{folder / TENSORS} lacks {lacking}; copy the folder again")
    if not layers:
        raise EckartError(f"{folder / TENSORS} adapts no linear layer with {kind}; eckart reads nothing else")
    return layers, rest, shared


def _needed(kind: str, found: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors that a layer must have."""
    if kind == LOKR:
        parts = ((name, (f"{name}_a", f"{name}_b")) for name in ("lokr_w1", "lokr_w2"))
        return [key for whole, factors in parts for key in ((whole,) if whole in found else factors)]
    return [key for key in OWN[kind] if key != "lora_magnitude_vector"]


def _rank(layer: str, kind: str, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Return the rank of a layer.

    Raises:
        ValueError: if its tensors tell another one than the config.
    """
    rank = int(_by_pattern(config.get("rank_pattern") or {}, layer, config.get("r", 8)))
    found = rank if kind == LOKR else rank_of(kind, own)
    if rank != found or rank < 1:
        raise ValueError(f"{layer} has rank {found}, but the config says {rank}")
    return rank


def _alpha(layer: str, rank: int, kind: str, config: Mapping[str, Any]) -> float:
    """Return the scale of a layer times its rank."""
    whole = config.get("lora_alpha" if kind == LORA else "alpha", 8)
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, layer, whole))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return the value of the first expression that the end of a layer's name matches."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
