"""Writing a compressed folder: finished parts beside the target while a run lasts, then the folder in one rename.

While it runs, a job's parts lie in a hidden folder beside the output, `.<name>.eckart-<key>`:

    job.json                   what is being done, for people who wonder what this folder is
    embedding.safetensors      the compressed embedding, if any; head.safetensors likewise
    block-0000.safetensors     every tensor of a finished block; the layers' specs are in the metadata
    elastic-*.safetensors      the components of an elastic folder, part by part, and their order
    search.safetensors         the state of a training run, of methods that have one; tune, fuse-* and lora-* likewise
    healed.safetensors         tensors of finished blocks that were changed by healing the whole model
    small/                     a smaller model whose layers become codes
    folder/                    the output, being written; renamed to the output at the very end
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from eckart.atomic import copy_file, make_folder, write_json, write_tensors, write_text
from eckart.errors import EckartError
from eckart.files.elastic import FOLDER as ELASTIC
from eckart.files.entries import EMBEDDING, FORMAT, LINEAR, QUANT_METHOD, TIED_HEAD, sentinel_name
from eckart.files.folder import OpenModel, copy_companions
from eckart.files.shards import Source, write_shards
from eckart.files.sharing import SHARED, borrowed_maps
from eckart.hosts import host
from eckart.maps import LinearMap, LowRank, Pivoted
from eckart.progress import Progress

# How the parts that hold the state of a training run are named.
TRAINING = ("search", "tune", "fuse", "lora")
# The part with the tensors that healing the whole model has changed.
HEALED = "healed"


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One compressed layer as written.

    Attributes:
        name: its module name.
        entry: its entry in config.json.
        structure: "lowrank", "pivoted", or the name of another family; "shared lowrank" and the like.
        rank: rank of its map, or how much there is of another structure.
        numbers: floating numbers stored, bias included; those of a shared tensor with its owner.
        nbytes: bytes stored, index tensors included.
        loss: predicted increase of the loss, in the plan's unit.
    """

    name: str
    entry: dict[str, Any]
    structure: str
    rank: int
    numbers: int
    nbytes: int
    loss: float

    @staticmethod
    def of(
        name: str,
        map_: LinearMap,
        bias: Tensor | None,
        loss: float,
        *,
        kind: str = LINEAR,
        padding_idx: int | None = None,
        planned: tuple[str, int] | None = None,
        shared: Mapping[str, str] | None = None,
        neurons: Mapping[str, Any] | None = None,
    ) -> "LayerRecord":
        """Describe a fitted layer.

        Args:
            name: its module name.
            map_: the map as stored.
            bias: its bias, or None.
            loss: predicted increase of the loss.
            kind: "linear" or "embedding".
            padding_idx: of an embedding.
            planned: structure and rank of the option chosen, needed unless the map is `LowRank` or `Pivoted`.
            shared: the layer that owns it, by the host's name of every tensor taken from another layer.
            neurons: what the entry says of its hidden units, if it has fewer.
        """
        spec = map_.spec()
        entry: dict[str, Any] = {"kind": kind, "map": spec}
        entry |= {"padding_idx": padding_idx} if kind == EMBEDDING else {"bias": bias is not None}
        entry |= {SHARED: dict(shared)} if shared else {}
        entry |= {} if neurons is None else {"neurons": dict(neurons)}
        own, taken = 0 if bias is None else bias.numel(), borrowed_maps(host(map_), shared or ())
        numbers = map_.numbers + own - sum(factor.numbers for factor in taken)
        nbytes = map_.nbytes + own * map_.dtype.itemsize - sum(factor.nbytes for factor in taken)
        structure, rank = planned or (type(map_).__name__.lower(), min(map_.shape))
        if isinstance(map_, LowRank | Pivoted):
            rank = map_.rank  # less than planned, if the weight has less
        return LayerRecord(name, entry, structure, rank, numbers, nbytes, loss)


@dataclass(frozen=True, slots=True)
class Partial:
    """The finished parts of a run.

    Attributes:
        folder: where they are.
    """

    folder: Path

    def begin(self, job: Mapping[str, Any]) -> None:
        """Make the folder, or find it as an earlier run of the same job left it.

        Raises:
            EckartError: if it cannot be made.
        """
        make_folder(self.folder)
        write_json(self.folder / "job.json", job)

    def path(self, part: str) -> Path:
        """Return where a part is."""
        return self.folder / f"{part}.safetensors"

    def has(self, part: str) -> bool:
        """Tell whether a part is finished."""
        return self.path(part).is_file()

    def blocks_done(self) -> int:
        """Return how many blocks are finished."""
        done = 0
        while self.has(_block(done)):
            done += 1
        return done

    def worth_keeping(self) -> bool:
        """Tell whether hours of work may be in here: a finished block, or the state of a training run."""
        return self.blocks_done() > 0 or any(next(self.folder.glob(f"{part}*.safetensors"), None) for part in TRAINING)

    def save(self, part: str, tensors: Mapping[str, Tensor], records: Sequence[LayerRecord]) -> None:
        """Write a finished part: tensors by full name, and the records of its compressed layers."""
        metadata = {"format": "pt", "records": json.dumps([asdict(record) for record in records])}
        write_tensors(self.path(part), tensors, metadata)

    def save_block(self, index: int, tensors: Mapping[str, Tensor], records: Sequence[LayerRecord]) -> None:
        """Write a finished block."""
        self.save(_block(index), tensors, records)

    def parts(self) -> list[str]:
        """Return the names of the finished parts, in the model's order."""
        blocks = [_block(i) for i in range(self.blocks_done())]
        return [*(["embedding"] if self.has("embedding") else []), *blocks, *(["head"] if self.has("head") else [])]

    def records(self) -> list[LayerRecord]:
        """Return the records of all finished layers, in the model's order."""
        out = []
        for part in self.parts():
            with safe_open(self.path(part), "pt") as handle:
                out += [LayerRecord(**record) for record in json.loads(handle.metadata()["records"])]
        return out

    def fresh_folder(self, name: str = "folder") -> Path:
        """Return an empty folder of a name, by default that for the output."""
        folder = self.folder / name
        if folder.exists():
            shutil.rmtree(folder)  # left by a run stopped while writing
        folder.mkdir()
        return folder

    def discard(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _block(index: int) -> str:
    return f"block-{index:04d}"


def _stored(partial: Partial) -> dict[str, Source]:
    """Return the tensors of the finished parts by name, as healed if they are."""
    out = {}
    for part in (*partial.parts(), *([HEALED] if partial.has(HEALED) else [])):
        path = partial.path(part)
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                out[name] = Source(tensor.nbytes, lambda path=path, name=name: _read(path, name))  # type: ignore[misc]
    return out


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor


def _sources(partial: Partial, model: OpenModel, blocks: Sequence[str], replaced: set[str]) -> dict[str, Source]:
    """Return all tensors of the output by name: finished parts, and the original's outside the blocks."""
    out = _stored(partial)
    for name in model.outside(blocks):
        if name not in replaced:
            nbytes = model.stored_dtype(name).itemsize * math.prod(model.shape(name))
            out[name] = Source(nbytes, lambda name=name: model.read(name))  # type: ignore[misc]
    return out


def _replaced(entries: Mapping[str, Any]) -> set[str]:
    """Return the names of the original's parameters that compressed layers replace; a tied head keeps its bias."""
    weights = {f"{name}.weight" for name in entries}
    return weights | {f"{name}.bias" for name, entry in entries.items() if entry["kind"] != TIED_HEAD}


def layer_entries(records: Sequence[LayerRecord], embedding: str | None, head: str | None) -> dict[str, Any]:
    """Return the entries of config.json by module name.

    Args:
        records: the compressed layers.
        embedding: name of the token embedding.
        head: name of the head tied to it, or None.
    """
    entries = {record.name: record.entry for record in records}
    if head is not None and embedding in entries:
        entries[head] = {"kind": TIED_HEAD, "embedding": embedding}
    return entries


def write_folder(
    partial: Partial,
    model: OpenModel,
    blocks: Sequence[str],
    entries: Mapping[str, Any],
    made_by: Mapping[str, Any],
    texts: Mapping[str, str],
    progress: Progress,
    sizes: Sequence[float] = (),
) -> Path:
    """Write the output inside the partial folder and return its path; `publish` renames it.

    Args:
        partial: the finished parts.
        model: the original.
        blocks: names of its blocks.
        entries: the compressed layers, as in config.json.
        made_by: method, settings and figures, for config.json.
        texts: further text files by name, such as the model card.
        progress: told of the stage "write".
        sizes: those that the components of an elastic folder were fitted at, ascending.
    """
    folder = partial.fresh_folder()
    sources = _sources(partial, model, blocks, _replaced(entries))
    sentinel = sentinel_name(entries)
    if sentinel:
        sources[sentinel] = Source(0, lambda: torch.empty(0))
    write_shards(folder, sources, lambda done: progress("write", done, len(sources)))
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    if entries or sizes:
        tied = any(entry["kind"] == TIED_HEAD for entry in entries.values())
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "layers": dict(entries),
            "sentinel": sentinel,
            "tied": tied,
            "made_by": dict(made_by),
        }
        if tied:
            config["tie_word_embeddings"] = False
        if sizes:
            config["quantization_config"]["elastic"] = {"least": sizes[0], "largest": sizes[-1]}
            config["keep"] = sizes[-1]  # an attribute of the config, hence an argument of `from_pretrained`
            for path in sorted(partial.folder.glob(f"{ELASTIC}-*.safetensors")):
                copy_file(path, folder / ELASTIC / path.name.removeprefix(f"{ELASTIC}-"))
    write_json(folder / "config.json", config)
    copy_companions(model.folder, folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder


def publish(folder: Path, out: Path) -> None:
    """Give a finished folder its final name, in one rename.

    Raises:
        EckartError: if something has appeared there meanwhile, or it cannot be renamed.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)
    except OSError as error:
        raise EckartError(f"cannot rename {folder} to {out}: {error.strerror}; move it there by hand") from error
