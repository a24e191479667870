"""Statistics on disk, one file per block and kind, so that memory holds one block's at a time and runs share them.

A store is a folder named by the content it was computed from: model, samples and format. Files are written atomically;
whatever is there is complete.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eckart.atomic import aligned, write_tensors
from eckart.errors import EckartError

# Raised whenever a statistic changes its meaning, so that older caches are not read.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of named tensors by (kind, index).

    Attributes:
        folder: where the files are.
        device: where `load` puts tensors.
    """

    folder: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def path(self, kind: str, index: int) -> Path:
        """Return where the tensors of a kind and index are."""
        return self.folder / f"{kind}-{index:04d}.safetensors"

    def has(self, kind: str, count: int) -> bool:
        """Tell whether the files 0 ... count - 1 of a kind are all there."""
        return all(self.path(kind, i).is_file() for i in range(count))

    def save(self, kind: str, index: int, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Save tensors by part and name."""
        flat = {f"{part}|{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        write_tensors(self.path(kind, index), flat)

    def load(
        self, kind: str, index: int, wanted: Callable[[str], bool] = lambda part: True
    ) -> dict[str, dict[str, Tensor]]:
        """Load what `save` wrote, or only the parts that are wanted.

        Raises:
            EckartError: if the file was damaged since.
        """
        path = self.path(kind, index)
        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                keys = [key for key in file.keys() if wanted(key.partition("|")[0])]  # noqa: SIM118
                flat = {key: aligned(file.get_tensor(key)) for key in keys}
        except (SafetensorError, OSError) as error:
            raise EckartError(f"{path} is damaged ({error}); delete its folder and run again") from error
        out: dict[str, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            part, _, name = key.partition("|")
            out.setdefault(part, {})[name] = tensor
        return out

    def drop(self, kind: str, count: int) -> None:
        """Delete the files 0 ... count - 1 of a kind."""
        for i in range(count):
            self.path(kind, i).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the whole folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(p.stat().st_size for p in self.folder.glob("*.safetensors"))


def content_key(parts: Iterable[str], samples: Iterable[Tensor]) -> str:
    """Return a name for statistics: a hash of strings (such as the model's hash) and of the token ids, in order."""
    digest = hashlib.sha256(f"eckart statistics {FORMAT}".encode())
    for part in parts:
        digest.update(part.encode() + b"\0")
    for batch in samples:
        digest.update(str(tuple(batch.shape)).encode())
        digest.update(batch.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:32]
