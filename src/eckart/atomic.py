"""Writing files so that a reader sees either the old file or the whole new one, whatever happens meanwhile, and reading
tensors back so that they compute the same bits as those written.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eckart.errors import EckartError

# Bytes at whose multiples torch puts tensors on the CPU.
ALIGNMENT = 64


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on failure it is removed.

    Raises:
        EckartError: if the file cannot be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise EckartError(f"cannot write {path}: {reason}; free some space or choose another place") from error
    finally:
        with suppress(OSError):  # it may never have come to be
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, atomically."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(held, temporary, metadata=dict(metadata or {"format": "pt"}))
        except SafetensorError as error:  # what the library raises where a file cannot be written
            raise OSError(None, str(error)) from error


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor where torch would have put it: read from a file it begins anywhere, and on some processors a
    product then differs in its last bits.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        EckartError: if there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EckartError(f"{path} cannot be read as JSON ({error}); copy the folder again") from error
    if not isinstance(value, dict):
        raise EckartError(f"{path} should hold a JSON object, got a {type(value).__name__}")
    return value


def make_folder(folder: Path) -> None:
    """Make the folder of a run's unfinished work, or find it as an earlier run left it.

    Raises:
        EckartError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EckartError(f"cannot write beside {folder.parent}: {error.strerror}; choose another --out") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, atomically."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def check_output(out: Path) -> None:
    """Check that a folder can be written.

    Raises:
        EckartError: if it holds something, is a file, or lies where nothing can be written.
    """
    if out.is_dir() and any(out.iterdir()):
        raise EckartError(f"the output folder {out} already holds something; give a new or an empty one")
    if out.exists() and not out.is_dir():
        raise EckartError(f"the output {out} is a file; give the path of a folder that does not exist yet")
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise EckartError(f"{parent} cannot be written to; give a folder elsewhere")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out` that takes its place on success and is removed on failure."""
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(out)
    except OSError as error:
        raise EckartError(
            f"cannot write {out}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
