"""Elastic folders: a compressed folder that can be cut down to any smaller size, without data.

Beside what every compressed folder holds, at its largest size, lies

    elastic/order.safetensors      "steps" (s, 2) int32 and "losses" (s,) float64; the layers as JSON in the metadata
    elastic/NAME.safetensors       for one part of the model (embedding, block-0000, ..., head), the components of its
                                   layers: "<layer>.up" (k, m) and "<layer>.down" (k, n), one row per component, and
                                   for the i-th size but the largest that the layer has components at,
                                   "<layer>.codes.i" (k_i, ceil(6 n / 8)) uint8 and "<layer>.scale.i" (k_i,) float32

Components are ordered by importance: rank r is the first r rows. A step (l, r) says that layer l goes to rank r, or is
left dense where r is 0; the first step of every layer is its least rank, and the others are in the order of the
predicted loss they save per number, over all layers. A size is the longest prefix of the steps that fits.

The up factors are shared by all sizes. The down factors also undo what the layers before have lost, which differs from
size to size; a cut between two fitted sizes takes those of the smaller one, of the larger only in the last quarter of
the way. They differ little from one fitted size to the next, so only the difference is held, in codes of six bits
(packed as in `eckart.maps.Quantized`):

    V_i = V_(i+1) + scale_i (codes_i - 32),    with the first k_i rows of V_(i+1)

Of a folder of codes (format 3) both factors are `eckart.maps.Quantized` with groups along rows, and every size has a
down factor of its own: "<layer>.up.PART" and "<layer>.down.i.PART", where PART is codes, scale, zero or levels, as far
as there are such. The codes of a size are the first rows of these: cutting decodes nothing. Only of an embedding the up
factor is stored as it is looked up, a row per token, and cut to its first columns.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eckart.atomic import write_tensors
from eckart.errors import EckartError
from eckart.files.components import CodeLayout, coded_map
from eckart.files.entries import EMBEDDING
from eckart.hosts import EmbeddingHost, embedding_host, host, map_of, offset_of
from eckart.maps import LinearMap, LowRank, pack, storage, stored, unpack

FOLDER, ORDER, KEY = "elastic", "order", "eckart_elastic"
LAYOUT, CODED_LAYOUT = 2, 3
# Bits of a difference between two sizes: eight lose no more than six, four up to a tenth of a percent (docs/LOG.md).
BITS = 6
# How far towards a larger size a cut still takes the down factors of the smaller one: undoing too much of what earlier
# layers have lost does less harm than undoing what they have not lost (docs/LOG.md).
SWITCH = 0.75
SCALE = torch.float32


@dataclass(frozen=True, slots=True)
class ElasticLayer:
    """A layer that is cut.

    Attributes:
        name: its module name.
        kind: kind of its entry in config.json.
        shape: (out, in).
        part: file of its components.
        bias: numbers in its bias.
        padding_idx: of an embedding.
        dense: whether the folder holds it dense.
        shared: whether one down factor serves all sizes.
        ranks: components to be used near each size, at most.
        itemsize: bytes per number.
        bias_itemsize: bytes per number of the bias it had; 0 for as many.
        coded_bytes: of a folder of codes, the bytes of it left dense; 0 in another.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    part: str
    bias: int
    padding_idx: int | None
    dense: bool
    shared: bool
    ranks: tuple[int, ...]
    itemsize: int
    bias_itemsize: int = 0  # which folders made before it was counted do not state
    coded_bytes: int = 0

    @property
    def table(self) -> bool:
        """Whether it is an embedding."""
        return self.kind == EMBEDDING

    def changes(self, near: int) -> list[int]:
        """Return the sizes whose differences lead from the down factors held to those of a size, in that order."""
        return [] if self.shared else [i for i in self.held if i >= near][-2::-1]

    @property
    def held(self) -> list[int]:
        """The sizes at which it is cut, ascending."""
        return [i for i, rank in enumerate(self.ranks) if rank]

    @property
    def down_sizes(self) -> list[int]:
        """The sizes that have down factors of their own in a folder of codes, ascending."""
        return self.held[-1:] if self.shared else self.held

    def down_size(self, near: int) -> int:
        """Return which of these a size near one of the folder's takes."""
        return next((i for i in self.down_sizes if i >= near), self.down_sizes[-1])

    @property
    def dense_bytes(self) -> int:
        """The bytes of it left dense."""
        return math.prod(self.shape) * self.itemsize + self.bias * (self.bias_itemsize or self.itemsize)

    @property
    def nbytes(self) -> int:
        """The bytes of its components."""
        (m, n), held = self.shape, [self.ranks[i] for i in self.held]
        coded = [] if self.shared else held[:-1]
        return max(held, default=0) * (m + n) * self.itemsize + sum(coded) * (-(-n * BITS // 8) + SCALE.itemsize)


@dataclass(frozen=True, slots=True)
class Slice:
    """What one layer becomes at a size.

    Attributes:
        rank: its rank; 0 for a layer left dense.
        numbers: floating numbers it stores, bias included.
        nbytes: bytes it stores, index tensors included.
        loss: predicted increase of the loss.
    """

    rank: int
    numbers: int
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Elastic:
    """The order of the components of an elastic folder.

    Attributes:
        folder: the model folder.
        sizes: the shares of the parameters that components were fitted at, ascending.
        parameters: of the dense model.
        fixed: those outside the layers that are cut.
        stored: name of the storage of low-rank maps.
        unit: what predicted losses are measured in.
        tied_head: head tied to the embedding, or None.
        layers: the layers.
        steps: (s, 2) int32: index of a layer, and its rank, 0 for dense.
        losses: (s,) float64, predicted loss of that layer from that step on.
        codes: how numbers are stored in a folder of codes; None in another.
    """

    folder: Path
    sizes: tuple[float, ...]
    parameters: int
    fixed: int
    stored: str
    unit: str
    tied_head: str | None
    layers: tuple[ElasticLayer, ...]
    steps: Tensor
    losses: Tensor
    codes: CodeLayout | None = None

    def layer(self, name: str) -> ElasticLayer:
        """Return a layer by name."""
        return next(each for each in self.layers if each.name == name)

    def plan(self, keep: float) -> dict[str, Slice]:
        """Return what every layer becomes at a size below the folder's own.

        Raises:
            EckartError: if the folder does not hold that size.
        """
        self.check(keep)
        near = fitted_for(self.sizes, keep)
        left = math.floor(keep * self.parameters + 1e-9) - self.fixed
        at: dict[int, Slice] = {}
        stopped: set[int] = set()
        for (index, rank), loss in zip(self.steps.tolist(), self.losses.tolist(), strict=True):
            layer, now = self.layers[index], at.get(index)
            most = layer.ranks[near]
            if now is None:  # the least rank, which it has in any case
                at[index] = self._slice(layer, min(rank, most), loss)
                left -= at[index].numbers
                continue
            held = rank <= most if rank else layer.dense
            then = self._slice(layer, rank, loss)
            if index in stopped or not held or then.numbers - now.numbers > left:
                stopped.add(index)
                continue
            left -= then.numbers - now.numbers
            at[index] = then
        return {self.layers[index].name: cut for index, cut in sorted(at.items())}

    def check(self, keep: float) -> None:
        """Raise an `EckartError` unless the folder holds a size."""
        if not isinstance(keep, int | float) or isinstance(keep, bool) or not self.sizes[0] <= keep <= self.sizes[-1]:
            least, most = self.sizes[0], self.sizes[-1]
            raise EckartError(f"{self.folder} holds every size from keep {least:g} to {most:g}, but {keep!r} was asked")

    def structure(self, cut: Slice) -> str:
        """Return what plans call a slice."""
        if self.codes is None:
            return self.stored if cut.rank else "dense"
        return f"{self.stored} int{self.codes.bits}" if cut.rank else f"int{self.codes.bits}"

    def figures(self, plan: Mapping[str, Slice], nbytes: int) -> tuple[int, int]:
        """Return the parameters and the bytes of the model at a size.

        Args:
            plan: what every layer becomes there.
            nbytes: of the dense model.
        """
        dense = sum(layer.dense_bytes for layer in self.layers)
        after = self.fixed + sum(cut.numbers for cut in plan.values())
        return after, nbytes - dense + sum(cut.nbytes for cut in plan.values())

    def held_bytes(self, layer: ElasticLayer) -> int:
        """Return the bytes of a layer's components."""
        if self.codes is None:
            return layer.nbytes
        ranks = [layer.ranks[i] for i in layer.down_sizes]
        up = self._up_bytes(layer, max(ranks, default=0))
        return up + sum(self.codes.nbytes(rank, layer.shape[1], layer.itemsize) for rank in ranks)

    def map(self, name: str, rank: int, keep: float) -> LinearMap:
        """Return the map of a layer at a rank, in the dtype it is stored in."""
        layer = self.layer(name)
        near = fitted_for(self.sizes, keep)
        path = self.folder / FOLDER / f"{layer.part}.safetensors"
        if self.codes is not None:
            return self._coded_map(layer, rank, near, path, self.codes)
        try:
            with safe_open(path, "pt") as handle:
                up, held = (handle.get_slice(f"{name}.{part}")[:rank] for part in ("up", "down"))
                changes = [
                    (handle.get_slice(f"{name}.codes.{i}")[:rank], handle.get_slice(f"{name}.scale.{i}")[:rank])
                    for i in layer.changes(near)
                ]
        except (SafetensorError, OSError) as error:
            raise EckartError(f"{path} is missing, damaged or incomplete ({error}); copy the folder again") from error
        (m, n), k = layer.shape, len(up)  # fewer than asked for if the layer itself has no more
        came = [tuple(t.shape) for t in (up, held, *(t for change in changes for t in change))]
        if came != [(k, m), (k, n), *(len(changes) * [(k, -(-n * BITS // 8)), (k,)])]:
            raise EckartError(f"the components of {name} in {path} are {came}, not those of a {layer.shape} layer")
        down = held.double()
        for codes, scale in changes:
            down = _changed(down, codes, scale)
        return built_map(up, down.to(held.dtype), self.stored, table=layer.table)

    def _coded_map(self, layer: ElasticLayer, rank: int, near: int, path: Path, codes: CodeLayout) -> LinearMap:
        (m, n), at = layer.shape, layer.down_size(near)
        try:
            with safe_open(path, "pt") as handle:
                ups, downs = (
                    {part: handle.get_tensor(f"{layer.name}.{side}.{part}") for part in codes.parts}
                    for side in ("up", f"down.{at}")
                )
            most = len(downs["codes"])
            up = codes.matrix(ups, most if layer.table else m)
            down = codes.matrix(downs, n)
        except (SafetensorError, OSError) as error:
            raise EckartError(f"{path} is missing, damaged or incomplete ({error}); copy the folder again") from error
        except EckartError as error:
            raise EckartError(f"the components of {layer.name} in {path} are damaged: {error}") from error
        if up.shape[0] < (m if layer.table else most):
            raise EckartError(f"the components of {layer.name} in {path} are {up.shape}, too few for {down.shape}")
        return coded_map(up, down, rank, table=layer.table)

    def _up_bytes(self, layer: ElasticLayer, rank: int) -> int:
        if self.codes is None:
            raise AssertionError("only folders of codes count them")
        rows, width = (layer.shape[0], rank) if layer.table else (rank, layer.shape[0])
        return self.codes.nbytes(rows, width, layer.itemsize)

    def entry(self, name: str, map_: LinearMap) -> dict[str, Any]:
        """Return the entry of a cut layer in config.json."""
        layer = self.layer(name)
        own = {"padding_idx": layer.padding_idx} if layer.table else {"bias": layer.bias > 0}
        return {"kind": layer.kind, "map": map_.spec(), **own}

    def _slice(self, layer: ElasticLayer, rank: int, loss: float) -> Slice:
        if rank == 0 and layer.dense:
            numbers = math.prod(layer.shape) + layer.bias
            return Slice(0, numbers, layer.coded_bytes or layer.dense_bytes, 0.0)
        kept = storage(self.stored)
        numbers = kept.numbers(layer.shape, rank) + layer.bias
        if self.codes is not None:
            nbytes = self._up_bytes(layer, rank) + self.codes.nbytes(rank, layer.shape[1], layer.itemsize)
            return Slice(rank, numbers, nbytes + layer.bias * layer.itemsize, loss)
        return Slice(rank, numbers, numbers * layer.itemsize + kept.index_bytes(layer.shape, rank), loss)


def built_map(up: Tensor, down: Tensor, storage_name: str, *, table: bool) -> LinearMap:
    """Return the map of some components as it is stored and in their dtype.

    Args:
        up: (k, m).
        down: (k, n).
        storage_name: how low-rank maps are stored.
        table: whether it is an embedding.
    """
    return stored(LowRank(up.mT.double(), down.double()), storage_name, table=table).to(up.dtype)


def coded_downs(
    layer: ElasticLayer, downs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the tensors that hold a layer's down factors, and the factors as they are read back.

    Args:
        layer: the layer.
        downs: (k_i, n) float64 for every size, ascending; k_i never falls, but is 0 where the layer is dense.
        dtype: of the numbers stored.
    """
    sizes, name = layer.held, layer.name
    read = [down.to(dtype) for down in downs]
    tensors = {f"{name}.down": read[sizes[-1]]}
    now = read[sizes[-1]].double()
    for i in reversed(sizes[:-1]):
        now = now[: len(downs[i])]
        change = downs[i] - now
        scale = (change.abs().amax(1) / (2 ** (BITS - 1) - 1)).to(SCALE)
        steps = (change / scale.double().clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        limit = 2 ** (BITS - 1)
        codes = pack((steps.clamp(1 - limit, limit - 1) + limit).to(torch.uint8), BITS)
        now = _changed(now, codes, scale)
        tensors |= {f"{name}.codes.{i}": codes, f"{name}.scale.{i}": scale}
        read[i] = now.to(dtype)
    return tensors, read


def _changed(down: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the down factors (k, n) float64 of the next smaller size."""
    steps: Tensor = unpack(codes, down.shape[1], BITS).double() - 2 ** (BITS - 1)
    return torch.addcmul(down, scale.double()[:, None], steps)


def module_of(map_: LinearMap, layer: ElasticLayer, bias: Tensor | None) -> nn.Module:
    """Return the module that a cut layer becomes."""
    return embedding_host(map_, layer.padding_idx) if layer.table else host(map_, bias)


def _shape(module: nn.Module) -> tuple[int, int]:
    return (module.held_map() if isinstance(module, EmbeddingHost) else map_of(module)).shape


def resized(name: str, old: nn.Module, map_: LinearMap, layer: ElasticLayer) -> nn.Module:
    """Return the module of a map that takes the place of a layer's module, on its device and in its dtype.

    Raises:
        EckartError: if that is offloaded, or has another shape.
    """
    shape = tuple(old.weight.shape) if isinstance(old, nn.Embedding) else _shape(old)
    if shape != map_.shape:
        raise EckartError(f"layer {name!r} is {shape} in this model, but its components are {map_.shape}")
    parameter = next(old.parameters())
    if parameter.is_meta:
        raise EckartError(f"layer {name!r} is offloaded, so it cannot be cut while loading; use eckart slice first")
    bias = None if layer.table else offset_of(old)
    return module_of(map_.to(parameter.dtype, parameter.device), layer, bias)


def switches(sizes: tuple[float, ...]) -> list[float]:
    """Return between which sizes down factors change hands: up to the i-th, a cut takes those of size i or smaller."""
    return [(1 - SWITCH) * small + SWITCH * large for small, large in pairwise(sizes)]


def fitted_for(sizes: tuple[float, ...], keep: float) -> int:
    """Return the index of the size whose down factors a cut to a given size takes."""
    return bisect_left([round(each, 9) for each in switches(sizes)], round(keep, 9))


def write_order(elastic: Elastic, path: Path) -> None:
    """Write the order of the components."""
    plain = {key: getattr(elastic, key) for key in ("sizes", "parameters", "fixed", "stored", "unit", "tied_head")}
    layout = {"format": LAYOUT} if elastic.codes is None else {"format": CODED_LAYOUT, "codes": asdict(elastic.codes)}
    text = json.dumps({**layout, **plain, "layers": [asdict(layer) for layer in elastic.layers]})
    write_tensors(path, {"steps": elastic.steps, "losses": elastic.losses}, {"format": "pt", KEY: text})


def read_order(folder: Path) -> Elastic:
    """Return the order of the components of an elastic folder.

    Raises:
        EckartError: if it is not elastic, or damaged.
    """
    path = folder / FOLDER / f"{ORDER}.safetensors"
    if not path.is_file():
        raise EckartError(
            f"{folder} is not elastic, so it has one size only; make one that is with eckart compress --elastic"
        )
    return read_order_file(path, folder)


def read_order_file(path: Path, folder: Path) -> Elastic:
    """Return the order of the components that `write_order` wrote, of a folder.

    Raises:
        EckartError: if the file is damaged.
    """
    try:
        with safe_open(path, "pt") as handle:
            values: Mapping[str, Any] = json.loads(handle.metadata()[KEY])
            steps, losses = handle.get_tensor("steps"), handle.get_tensor("losses")
        if values["format"] not in (LAYOUT, CODED_LAYOUT):
            came = f"{path} has format {values['format']}, but this version reads {LAYOUT} and {CODED_LAYOUT}"
            raise EckartError(f"{came}; make the folder again or use the version of eckart that made it")
        layers = tuple(
            ElasticLayer(**{**layer, "shape": tuple(layer["shape"]), "ranks": tuple(layer["ranks"])})
            for layer in values["layers"]
        )
        plain = {key: values[key] for key in ("parameters", "fixed", "stored", "unit", "tied_head")}
        sizes = tuple(float(size) for size in values["sizes"])
        codes = CodeLayout(**values["codes"]) if values["format"] == CODED_LAYOUT else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise EckartError(f"{path} is damaged ({error}); copy the folder again") from error
    fits = steps.ndim == 2 and steps.shape[1] == 2 and losses.shape == steps.shape[:1] and not bool((steps < 0).any())
    named = fits and steps[:, 0].unique().tolist() == list(range(len(layers)))
    described = all(len(layer.ranks) == len(sizes) and Path(layer.part).name == layer.part for layer in layers)
    if not named or not described or not sizes:
        raise EckartError(f"{path} does not describe the layers it names; copy the folder again")
    return Elastic(folder, sizes, layers=layers, steps=steps.to(torch.int64), losses=losses, codes=codes, **plain)
