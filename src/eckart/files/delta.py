"""A fine-tuned model stored as its difference from a base, and the way back.

    delta.json            what every tensor is made of: {"format", "base": {"name", "sha256"}, "restored": sha256,
                          "weights": sha256 of delta.safetensors, "companions": {file: sha256}, "tensors", "made_by"}
    delta.safetensors     the numbers of the differences, and what is stored whole
    config.json, ...      files that the base lacks or has in another form; the others are taken from the base

A tensor is the base's, rounded to its own dtype; or the base's plus a map, added in float64 and rounded once; or stored
whole. Rows that the base lacks (tokens added to a vocabulary) are stored whole. A tensor of more than two axes is taken
as the matrix whose two sides are most alike in size.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eckart.atomic import appearing, check_output, copy_file, write_tensors, write_text
from eckart.errors import EckartError, NumericalWarning
from eckart.files.folder import COMPANIONS, DTYPES, TensorFile, check_model_folder, tensor_file
from eckart.files.shards import Source, write_shards
from eckart.linalg import all_finite
from eckart.maps import FAMILIES, LinearMap, blank, from_spec, rank_bound
from eckart.progress import Progress, silent

SPEC, TENSORS = "delta.json", "delta.safetensors"
FORMAT = 1
# What a restored folder needs beside its weights.
CARRIED = ("config.json", *COMPANIONS)
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, slots=True)
class Change:
    """What one tensor of the tuned model is made of.

    Attributes:
        dtype: its dtype, as "float16".
        base: the tensor of the base that it starts from; None if it is stored whole.
        rows: how many leading rows start from there, the others are stored whole; None for all.
        map: spec of what is added, on the matrix that `matrix_shape` makes of the rows; None for nothing.
    """

    dtype: str
    base: str | None = None
    rows: int | None = None
    map: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what is not None, for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` wrote.

    Attributes:
        out: the folder.
        tensors: how many.
        nbytes: their bytes.
        exact: whether they are, bit for bit, those that `delta` computed when it wrote the difference.
    """

    out: Path
    tensors: int
    nbytes: int
    exact: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "out": str(self.out)}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a difference holds of one tensor.

    Attributes:
        name: its name in the tuned model.
        structure: "same" (the base's), "exact" (stored whole), or the class of what is added, in small letters.
        rank: largest rank of what is added; 0 for nothing.
        nbytes: bytes stored.
    """

    name: str
    structure: str
    rank: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What a folder that `delta` wrote holds.

    Attributes:
        folder: the folder.
        base: name of the base's folder when it was made.
        base_sha256: hash of the base's weights.
        nbytes: bytes of all files.
        made_by: method, settings, and what it was made from.
        tensors: every tensor of the tuned model.
    """

    folder: Path
    base: str
    base_sha256: str
    nbytes: int
    made_by: dict[str, Any]
    tensors: tuple[StoredTensor, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


def show_delta(folder: str | Path) -> Difference:
    """Return what a difference holds; the weights' hash is checked.

    Raises:
        EckartError: if the folder is none that `delta` wrote, or damaged.
    """
    folder = Path(folder)
    spec, changes = read_delta(folder)
    held = stored_tensors(folder)
    tensors = tuple(_stored(name, change, held, folder) for name, change in changes.items())
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    made_by = dict(spec.get("made_by", {}))
    return Difference(folder, spec["base"]["name"], spec["base"]["sha256"], nbytes, made_by, tensors)


def _stored(name: str, change: Change, held: TensorFile, folder: Path) -> StoredTensor:
    try:
        added = None if change.map is None else blank(change.map, FAMILIES, torch.float32)
        names = [] if added is None else list(map_tensors(name, added))
        names += [name] * (change.base is None) + [f"{name}.rows"] * (change.rows is not None)
        nbytes = sum(math.prod(held.shape(key)) * held.dtype(key).itemsize for key in names)
    except (EckartError, KeyError, TypeError, ValueError) as error:
        raise EckartError(f"what {folder / SPEC} says of {name} cannot be: {error}; copy the folder again") from error
    kind = "exact" if change.base is None else "same" if added is None else type(added).__name__.lower()
    return StoredTensor(name, kind, 0 if added is None else rank_bound(added), nbytes)


def restore(base: str | Path, delta: str | Path, out: str | Path, *, progress: Progress = silent) -> Restored:
    """Write the model that a difference and its base make, as an ordinary folder.

    Computed on CPU in float64 and rounded once to every tensor's dtype, so the bytes are the same each time. On another
    kind of processor a sum may round differently in its last bit; what was expected is recorded, and `exact` says
    whether it was met. Memory holds one shard.

    Args:
        base: folder of the base, the very one that the difference was made from.
        delta: folder that `delta` wrote.
        out: folder to write; must not hold anything yet.
        progress: called with ("check" or "restore", tensors done, tensors in all).

    Raises:
        EckartError: for another base, a damaged difference, or an output that cannot be written; nothing is written.
    """
    base, delta, out = Path(base), Path(delta), Path(out)
    check_output(out)
    spec, changes = read_delta(delta)
    check_model_folder(base)
    origin, held = tensor_file(base), stored_tensors(delta)
    found = fingerprint(lines_of(origin, progress).values())
    if found != spec["base"]["sha256"]:
        raise EckartError(
            f"{delta} is a difference from {spec['base']['name']}, whose weights have the hash "
            f"{spec['base']['sha256'][:12]}, but those in {base} have {found[:12]}; give the base that it was made from"
        )
    sources = {name: _checked(name, change, origin, held, delta) for name, change in changes.items()}
    companions = {name: _companion(name, sha256, base, delta) for name, sha256 in spec["companions"].items()}
    lines: dict[str, str] = {}

    def source(name: str) -> Source:
        def read() -> Tensor:
            tensor = restored(name, changes[name], origin, held.read)
            lines[name] = line_of(name, tensor)
            return tensor

        return Source(sources[name], read)

    with appearing(out) as temporary:
        write_shards(
            temporary, {name: source(name) for name in changes}, lambda done: progress("restore", done, len(changes))
        )
        for name, path in companions.items():
            copy_file(path, temporary / name)
    exact = fingerprint(lines.values()) == spec["restored"]
    if not exact:
        warnings.warn(
            f"{out} differs in rounding from what the machine that wrote {delta} computed", NumericalWarning, 2
        )
    return Restored(out, len(changes), sum(sources.values()), exact)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the sizes (m, n) of the matrix that a tensor is taken as: axes split where the sides are most alike."""
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(splits, key=sum)


def restored(name: str, change: Change, base: TensorFile, stored: Callable[[str], Tensor]) -> Tensor:
    """Return a tensor of the tuned model.

    Args:
        name: its name.
        change: what it is made of.
        base: the base's tensors.
        stored: returns a tensor of the difference by name.
    """
    if change.base is None:
        return stored(name)
    origin = base.read(change.base)
    origin = origin if change.rows is None else origin[: change.rows]
    out = origin if change.map is None else origin.double() + _added(name, change.map, stored).view(origin.shape)
    out = out.to(NAMES[change.dtype])
    return out if change.rows is None else torch.cat((out, stored(f"{name}.rows")))


def _added(name: str, spec: Mapping[str, Any], stored: Callable[[str], Tensor]) -> Tensor:
    """Return the difference of a tensor, (m, n) float64."""
    keys = blank(spec, FAMILIES, torch.float32).tensors()
    map_ = from_spec(spec, {key: stored(f"{name}.{key}") for key in keys}, FAMILIES)
    map_.validate()
    return map_.to(torch.float64).dense()


def map_tensors(name: str, map_: LinearMap) -> dict[str, Tensor]:
    """Return the tensors of a difference by the names they have in the file."""
    return {f"{name}.{key}": tensor for key, tensor in map_.tensors().items()}


def line_of(name: str, tensor: Tensor) -> str:
    """Return a line that changes if a tensor's name, dtype, shape or bytes do."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}"


def fingerprint(lines: Iterable[str]) -> str:
    """Return a hash of tensors, given as the lines of `line_of` in any order: it does not depend on their files."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def lines_of(tensors: TensorFile, progress: Progress, *, finite: bool = False) -> dict[str, str]:
    """Return the line of every tensor of a folder by name.

    Args:
        tensors: the tensors.
        progress: told of the stage "check".
        finite: whether NaN and Inf are refused.

    Raises:
        EckartError: for a damaged file, or such a number.
    """
    names, out = sorted(tensors.files), {}
    for i, name in enumerate(names):
        progress("check", i, len(names))
        tensor = tensors.read(name)
        if finite and tensor.is_floating_point() and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise EckartError(f"{name} in {tensors.folder} holds {bad} NaN or Inf values; the model is broken")
        out[name] = line_of(name, tensor)
    progress("check", len(names), len(names))
    return out


def stored_nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes that tensors take in a file, their entries in its header included, which may take fewer."""
    entries = {
        name: {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [10**12, 10**12]}
        for name, tensor in tensors.items()
    }
    return sum(tensor.nbytes for tensor in tensors.values()) + len(compact(entries))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_delta(
    folder: Path,
    changes: Mapping[str, Change],
    tensors: Mapping[str, Tensor],
    companions: Mapping[str, Path],
    base: Path,
    facts: Mapping[str, Any],
) -> None:
    """Write the files of a difference.

    Args:
        folder: an existing folder.
        changes: what every tensor of the tuned model is made of.
        tensors: what is stored, by name.
        companions: the tuned model's other files by name; those that the base has as well are only named.
        base: folder of the base.
        facts: "base", "restored" and "made_by" of delta.json.
    """
    write_tensors(folder / TENSORS, tensors)
    hashes = {name: file_hash(path) for name, path in companions.items()}
    for name in lacking(hashes, base):
        copy_file(companions[name], folder / name)
    written = {"companions": hashes, "weights": file_hash(folder / TENSORS)}
    write_text(folder / SPEC, delta_text(changes, {"format": FORMAT, **facts, **written}))


def lacking(hashes: Mapping[str, str], base: Path) -> list[str]:
    """Return the files that a base lacks or has in another form, given the hashes of the tuned model's."""
    return [name for name, sha256 in hashes.items() if not _is(base / name, sha256)]


def delta_text(changes: Mapping[str, Change], facts: Mapping[str, Any]) -> str:
    """Return delta.json: a line per tensor, without blanks, since all of it counts."""
    lines = (f"{json.dumps(name)}:{compact(change.as_dict())}" for name, change in changes.items())
    return compact(facts)[:-1] + ',"tensors":{\n' + ",\n".join(lines) + "\n}}\n"


def compact(value: Any) -> str:
    """Return JSON without blanks."""
    return json.dumps(value, separators=(",", ":"))


def read_delta(folder: Path) -> tuple[dict[str, Any], dict[str, Change]]:
    """Return delta.json and what it says of every tensor, the weights' hash checked.

    Raises:
        EckartError: if the folder is none that `delta` wrote, of a later format, or damaged.
    """
    if not (folder / SPEC).is_file():
        raise EckartError(f"{folder} has no {SPEC}; give a folder that eckart delta wrote")
    try:
        spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        changes = {name: Change(**change) for name, change in spec["tensors"].items()}
        stated = [spec["base"]["name"], spec["base"]["sha256"], spec["restored"], spec["weights"]]
        files, form = dict(spec["companions"]), int(spec["format"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EckartError(f"{folder / SPEC} is damaged ({error}); copy the folder again") from error
    if form != FORMAT:
        raise EckartError(f"{folder} has the format {form}, and this version of eckart reads {FORMAT}; update eckart")
    plain = all(isinstance(value, str) for value in (*stated, *files.values()))
    if not plain or not set(files) <= set(CARRIED) or any(change.dtype not in NAMES for change in changes.values()):
        raise EckartError(f"{folder / SPEC} is damaged: a hash, a file name or a dtype is none; copy the folder again")
    if not _is(folder / TENSORS, spec["weights"]):
        raise EckartError(f"{folder / TENSORS} is missing or damaged; copy the folder again")
    return spec, changes


def stored_tensors(folder: Path) -> TensorFile:
    """Open the tensors of a difference.

    Raises:
        EckartError: if they cannot be read.
    """
    try:
        with safe_open(folder / TENSORS, "pt") as handle:
            return TensorFile(folder, dict.fromkeys(handle.keys(), TENSORS))
    except (SafetensorError, OSError) as error:
        raise EckartError(f"{folder / TENSORS} is damaged ({error}); copy the folder again") from error


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and file_hash(path) == sha256


def _companion(name: str, sha256: str, base: Path, delta: Path) -> Path:
    """Return where a file of the tuned model is."""
    for folder in (delta, base):
        if _is(folder / name, sha256):
            return folder / name
    raise EckartError(
        f"neither {delta} nor {base} has the {name} that the tuned model had; copy the folder that lost it again"
    )


def _checked(name: str, change: Change, base: TensorFile, held: TensorFile, folder: Path) -> int:
    """Return the bytes of a restored tensor, everything it is made of checked by headers alone.

    Raises:
        EckartError: if something is missing or does not fit.
    """
    try:
        return _nbytes(name, change, base, held)
    except (EckartError, KeyError, TypeError, ValueError) as error:
        raise EckartError(f"what {folder / SPEC} says of {name} cannot be: {error}; copy the folder again") from error


def _nbytes(name: str, change: Change, base: TensorFile, held: TensorFile) -> int:
    if change.base is None:
        return math.prod(held.shape(name)) * held.dtype(name).itemsize
    shape = base.shape(change.base)
    total = 0 if change.rows is None else math.prod(held.shape(f"{name}.rows"))
    shape = shape if change.rows is None else (min(change.rows, shape[0]), *shape[1:])
    if change.map is not None:
        map_ = blank(change.map, FAMILIES, torch.float32)
        wrong = [
            f"{key} has the shape {held.shape(key)}"
            for key, tensor in map_tensors(name, map_).items()
            if held.shape(key) != tuple(tensor.shape)
        ]
        if wrong or map_.shape != matrix_shape(shape):
            raise EckartError(", ".join(wrong) or f"a map of shape {map_.shape} on a tensor of shape {shape}")
    return (total + math.prod(shape)) * NAMES[change.dtype].itemsize
