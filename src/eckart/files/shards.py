"""Writing the weights of a folder tensor by tensor: how large each is, and how to get it when its shard is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from eckart.atomic import write_json, write_tensors
from eckart.files.folder import INDEX

# Bytes per shard: what memory holds while a folder is written.
SHARD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor to be written.

    Attributes:
        nbytes: its size.
        read: makes it.
    """

    nbytes: int
    read: Callable[[], Tensor]


def write_shards(folder: Path, sources: Mapping[str, Source], progress: Callable[[int], None]) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index if they exceed `SHARD_BYTES`.

    Args:
        folder: where to.
        sources: the tensors by name.
        progress: called with the number of tensors read so far.

    Raises:
        EckartError: if a file cannot be written.
    """
    split = split_state_dict_into_shards_factory(
        dict(sources),
        get_storage_size=lambda source: source.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    done = 0
    for file, names in sorted(split.filename_to_tensors.items()):
        held = {}
        for name in names:
            progress(done)
            held[name] = sources[name].read()
            done += 1
        write_tensors(folder / file, held)
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    progress(done)
