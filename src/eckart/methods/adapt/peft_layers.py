"""One layer's adapter in PEFT's terms: the tensors that PEFT stores of it, both ways.

    low rank, thin products, sums of them   LORA: sum_i s_i B_i A_i = s [B_1 s_1/s, B_2 s_2/s, ...] [A_1; A_2; ...]
    the same, rows rescaled                 LORA with use_dora
    tiles                                   MISS
    reflections                             HRA
    rotations of blocks                     OFT without Cayley-Neumann
    one Kronecker product                   LOKR, its factors whole; those of low rank are read as such
    Hadamard product of two low ranks       LOHA
    Hadamard product of W and a low rank    HIRA
    a diagonal matrix times W, or behind it IA3
    sparse entries, k (m + n) of them       SHIRA
    diag(b) B diag(d) A                     VERA, read alone: written as LORA

What is frozen, and what a rule does to gradients, PEFT's format does not know: trained further there, all factors move.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.files.peft import HIRA, HRA, IA3, LOHA, LOKR, LORA, MISS, OFT, SHIRA, VERA, PeftAdapter, block_size
from eckart.hosts import Adapter, map_of
from eckart.hosts.adapter import Change, Left, Plus, Rescaled, Times
from eckart.hosts.entrywise import Multiplied
from eckart.maps import (
    Cayley,
    Dense,
    Diagonal,
    Hadamard,
    Householder,
    Kronecker,
    LinearMap,
    LowRank,
    Product,
    Scaled,
    Sparse,
    Sum,
    Tiled,
    sparse_of,
)
from eckart.methods.adapt.described import Described
from eckart.methods.adapt.lokr import factored_kronecker
from eckart.methods.adapt.vera import random_factors

OWN = 'save it with format="eckart"'
NARROW = (torch.float16, torch.bfloat16)
# Type, tensors, scale and dropout of a layer.
Layered = tuple[str, dict[str, Tensor], float, float]


def to_peft(name: str, adapter: Adapter) -> Layered:
    """Return the type, the tensors, the scale and the dropout of a layer.

    Raises:
        EckartError: if PEFT has no type that computes the same.
    """
    match adapter.chain():
        case [Plus() as plus]:
            found = _one_added(map_of(plus.delta), plus.scale, _dropout([plus]))
        case [change]:
            found = _one_multiplied(change)
        case _:
            found = None
    if found is not None:
        return found
    match adapter.chain():
        case [*changes, Rescaled(magnitude=magnitude)] if changes:
            rescaled = {"lora_magnitude_vector": magnitude}
        case changes:
            rescaled = {}
    sums = [change for change in changes if isinstance(change, Plus)]
    pairs = [thin_factors(map_of(change.delta)) for change in sums]
    if len(sums) != len(changes) or any(pair is None for pair in pairs):
        words = " then ".join(_word(change) for change in adapter.chain())
        raise EckartError(f"PEFT has no type for {words}, which {name} has; {OWN}")
    scale = next((change.scale for change in reversed(sums) if change.scale), 1.0)
    weighted = [(pair[0] * (change.scale / scale), pair[1]) for pair, change in zip(pairs, sums, strict=True) if pair]
    up, down = torch.cat([up for up, _ in weighted], 1), torch.cat([down for _, down in weighted])
    return LORA, {"lora_A.weight": down, "lora_B.weight": up, **rescaled}, scale, _dropout(sums)


def _one_added(delta: LinearMap, scale: float, dropout: float) -> Layered | None:
    """Return W + s D in the terms of a type of its own; None if D is of none."""
    match delta:
        case Tiled(tile):
            return MISS, {"miss_block": scale * tile.mT}, 1.0, dropout
        case Sparse(values, columns) if not dropout:
            places = torch.stack((delta.rows().to(torch.int32), columns.to(torch.int32)))
            return SHIRA, {"shira_weight": scale * values, "shira_indices": places}, 1.0, 0.0
        case Hadamard(LowRank() as first, LowRank() as second) if first.rank == second.rank and not dropout:
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            parts = (first.up, first.down, second.up, second.down)
            return LOHA, dict(zip(names, parts, strict=True)), scale, 0.0
    pair = _kronecker_factors(delta)
    if pair is None or dropout:
        return None
    return LOKR, {"lokr_w1": pair[0], "lokr_w2": pair[1]}, scale, 0.0


def _one_multiplied(change: Change) -> Layered | None:
    """Return a change that multiplies W in PEFT's terms; None if it has none."""
    match change:
        case Times(right=right):
            inner = map_of(right)
            if isinstance(inner, Householder):
                return HRA, {"hra_u": inner.vectors.mT}, 1.0, 0.0
            if isinstance(inner, Cayley):
                return OFT, {"oft_R.weight": inner.skew}, 1.0, 0.0
            return (IA3, {"ia3_l": inner.scale[None]}, 1.0, 0.0) if isinstance(inner, Diagonal) else None
        case Left(left=left):
            inner = map_of(left)
            return (IA3, {"ia3_l": inner.scale[:, None]}, 1.0, 0.0) if isinstance(inner, Diagonal) else None
        case Multiplied(factor=factor, scale=scale):
            pair = thin_factors(map_of(factor))
            return None if pair is None else (HIRA, {"hira_A": pair[1], "hira_B": scale * pair[0]}, 1.0, 0.0)
    return None


def _kronecker_factors(map_: LinearMap) -> tuple[Tensor, Tensor] | None:
    """Return the factors of a map that is one Kronecker product, or a product of such; None of others."""
    match map_:
        case Kronecker(left, right) if left.shape[0] == 1:
            return left[0], right[0]
        case Product((first, second)):
            one, two = _kronecker_factors(first), _kronecker_factors(second)
            if one and two and one[0].shape[1] == two[0].shape[0] and one[1].shape[1] == two[1].shape[0]:
                return one[0] @ two[0], one[1] @ two[1]
    return None


def _dropout(changes: Sequence[Plus]) -> float:
    return max(0.0 if change.dropout is None else change.dropout.p for change in changes)


def _word(change: Change) -> str:
    held = change.delta if isinstance(change, Plus) else change.right if isinstance(change, Times) else None
    inner = f" of a {type(map_of(held)).__name__}" if held is not None else ""
    return f"{type(change).__name__}{inner}"


def thin_factors(map_: LinearMap) -> tuple[Tensor, Tensor] | None:
    """Return U (m, r) and V (r, n) with U V the map, r the least inner size of its structure; None if it has none."""
    match map_:
        case LowRank(up, down):
            return up, down
        case Scaled(inner, scale):
            pair = thin_factors(inner)
            return None if pair is None else (pair[0] * scale, pair[1])
        case Sum(maps):
            parts = [pair for pair in map(thin_factors, maps) if pair is not None]
            if len(parts) < len(maps):
                return None
            return torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts])
        case Product(maps) if len(maps) > 1 and all(isinstance(part, (Dense, Diagonal, LowRank)) for part in maps):
            cut = min(range(1, len(maps)), key=lambda i: maps[i].shape[0])
            sides = [Product(part).to(torch.float64).dense() for part in (maps[:cut], maps[cut:])]
            return sides[0].to(map_.dtype), sides[1].to(map_.dtype)
        case _:
            return None


def from_peft(peft: PeftAdapter, layer: str, shape: tuple[int, int], *, biased: bool) -> list[Change]:
    """Return the changes of a layer, in float32 or wider.

    Args:
        peft: what was read.
        layer: name of the layer.
        shape: (m, n) of its weight.
        biased: whether it has a bias.

    Raises:
        EckartError: if its tensors do not fit, or scale a bias.
    """
    given = {**peft.shared, **peft.layers[layer]}
    own = {key: tensor.float() if tensor.dtype in NARROW else tensor for key, tensor in given.items()}
    if peft.kind == IA3 and biased and own["ia3_l"].shape[0] > 1:
        raise EckartError(f"IA3 scales the bias of {layer} as well, which eckart cannot express; train without it")
    try:
        return _changes(peft, layer, shape, own)
    except EckartError as error:
        raise EckartError(f"the tensors of {layer} do not fit: {error}") from error


def _changes(peft: PeftAdapter, layer: str, shape: tuple[int, int], own: Mapping[str, Tensor]) -> list[Change]:
    m, n = shape
    match peft.kind:
        case "LORA":
            low_rank = LowRank(own["lora_B.weight"], own["lora_A.weight"])
            lengths = [Rescaled(own[key]) for key in own if key == "lora_magnitude_vector"]
            return [Plus(low_rank, peft.scale(layer), dropout=peft.dropout), *lengths]
        case "MISS":
            return [Plus(Tiled(own["miss_block"].mT.contiguous(), n), dropout=peft.dropout)]
        case "HRA":
            return [Times(Householder(own["hra_u"].mT.contiguous()))]
        case "LOKR":
            return [_kronecker(own, peft.scale(layer))]
        case "LOHA":
            first, second = (LowRank(own[f"hada_w{i}_a"], own[f"hada_w{i}_b"]) for i in (1, 2))
            return [Plus(Hadamard(first, second), peft.scale(layer))]
        case "HIRA":
            return [Multiplied(LowRank(own["hira_B"], own["hira_A"]))]
        case "IA3":
            scale = own["ia3_l"]
            return [Times(Diagonal(scale[0]))] if scale.shape[0] == 1 else [Left(Diagonal(scale.flatten()))]
        case "SHIRA":
            return [Plus(_sparse(own["shira_indices"], own["shira_weight"], shape))]
        case "VERA":
            rows, middle = own["vera_lambda_b"], own["vera_lambda_d"]
            up, down = own["vera_B"][:m].clone(), own["vera_A"][:, :n].clone()
            return [random_factors(rows, up, middle, down, peft.dropout)]
        case _:
            return [Times(Cayley(own["oft_R.weight"], block_size(own["oft_R.weight"])))]


def _kronecker(own: Mapping[str, Tensor], scale: float) -> Plus:
    """Return the change of LOKR, with factors of low rank where PEFT has them: (A1 A2) (x) (B1 B2) = (A1 (x) B1) ..."""
    whole = [own.get(f"lokr_w{i}") for i in (1, 2)]
    if whole[0] is not None and whole[1] is not None:
        return Plus(Kronecker(whole[0][None], whole[1][None]), scale)
    if whole[0] is not None:
        return factored_kronecker(whole[0], own["lokr_w2_a"], own["lokr_w2_b"], scale)
    if whole[1] is not None:
        eye = torch.eye(whole[1].shape[0], dtype=whole[1].dtype)
        left = Kronecker(own["lokr_w1_a"][None], eye[None])
        change = Plus(Product((left, Kronecker(own["lokr_w1_b"][None], whole[1][None]))), scale)
        change.get_parameter("delta.0.right").requires_grad_(False)
        return change
    parts = [Kronecker(own[f"lokr_w1_{side}"][None], own[f"lokr_w2_{side}"][None]) for side in "ab"]
    return Plus(Product(tuple(cast(list[LinearMap], parts))), scale)


def _sparse(places: Tensor, values: Tensor, shape: tuple[int, int]) -> LinearMap:
    """Return the sparse map of values at (row, column), in the order of its places."""
    rows, columns = places.long()
    inside = bool(((places >= 0) & (places < torch.tensor(shape)[:, None])).all())
    if values.shape[0] != places.shape[1] or not inside:
        raise EckartError(f"{values.shape[0]} values at places {tuple(places.shape)} in a matrix {shape}")
    order = torch.argsort(rows * shape[1] + columns)
    return sparse_of(rows[order], columns[order], values[order], shape)


def described_peft(peft: PeftAdapter, trained: tuple[str, ...]) -> Described:
    """Return the method that trains an adapter of PEFT on, with the settings of the config."""
    first = next(iter(peft.layers.values()))
    made: dict[str, tuple[str, dict[str, object]]] = {
        LOKR: ("lokr", {"rank": peft.rank, "alpha": peft.alpha}),
        LOHA: ("loha", {"rank": peft.rank, "alpha": peft.alpha}),
        HIRA: ("hira", {"rank": peft.rank}),
        VERA: ("vera", {"rank": peft.rank, "dropout": peft.dropout}),
        IA3: ("ia3", {}),
        SHIRA: ("lift", {"budget": peft.rank, "select": "random", "refresh": 0}),
    }
    if peft.kind in made:
        method, settings = made[peft.kind]
        return Described(method, settings, 0, trained)
    if peft.kind == MISS:
        return Described("miss", {"rank": first["miss_block"].shape[0], "dropout": peft.dropout}, 0, trained)
    if peft.kind == HRA:
        rank = first["hra_u"].shape[1]  # an odd one could not start as the base, but need not
        return Described("hra", {"rank": rank} if rank % 2 == 0 else {}, 0, trained)
    if peft.kind == OFT:
        return Described("oft", {"block": block_size(first["oft_R.weight"])}, 0, trained)
    method = "dora" if peft.has_magnitudes else "rslora" if peft.rank_stabilized else "lora"
    alpha = peft.alpha * peft.rank**0.5 if method == "dora" and peft.rank_stabilized else peft.alpha
    return Described(method, {"rank": peft.rank, "alpha": alpha, "dropout": peft.dropout}, 0, trained)
