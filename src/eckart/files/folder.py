"""Reading a Hugging Face model folder lazily: config, tokenizer, and single tensors out of sharded safetensors."""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging as hf_logging

from eckart.atomic import copy_file, read_json
from eckart.errors import EckartError
from eckart.linalg import all_finite
from eckart.progress import Progress

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files that make a folder usable beside config and weights: copied along as they are.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip
# What safetensors calls the dtypes of weights.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def copy_companions(folder: Path, out: Path) -> None:
    """Copy what makes a model folder usable beside config and weights, as far as it is there, into another folder."""
    for name in COMPANIONS:
        if (folder / name).is_file():
            copy_file(folder / name, out / name)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of a folder, read one at a time.

    Attributes:
        folder: the model folder.
        files: file name by tensor name.
    """

    folder: Path
    files: dict[str, str]
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            EckartError: if the file is damaged.
        """
        # Opened anew: pages of a file that stays mapped count as this process's memory once they were read.
        with self._damage(self.files[name]), safe_open(self.folder / self.files[name], "pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        with self._damage(self.files[name]):
            return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor without reading it."""
        with self._damage(self.files[name]):
            code = str(self._handle(name).get_slice(name).get_dtype())
        return DTYPES.get(code, torch.float32)

    def _handle(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = _opened(self.folder / file)
        return self._open[file]

    @contextlib.contextmanager
    def _damage(self, file: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise EckartError(
                f"{self.folder / file} is damaged or incomplete ({error}); download or copy it again"
            ) from error


def _opened(path: Path) -> Any:
    handle: Any = safe_open(path, "pt")
    return handle.__enter__()


def tensor_file(folder: Path) -> TensorFile:
    """Open the safetensors of a folder, sharded or not; every header is read, so truncated files are found now.

    Raises:
        EckartError: if there are none, a shard is missing, or a file is damaged.
    """
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise EckartError(f"{folder / INDEX} has no weight_map; download or copy it again")
        missing = sorted({f for f in files.values() if not (folder / f).is_file()})
        if missing:
            raise EckartError(f"{folder} lacks the shards {', '.join(missing)} that its index names")
    elif (folder / SINGLE).is_file():
        files = {}
    elif any(folder.glob("*.bin")):
        raise EckartError(
            f"{folder} holds pickled weights only, which eckart does not read; convert them to safetensors first"
        )
    else:
        raise EckartError(f"{folder} has no {SINGLE} and no {INDEX}; is it a model folder?")
    opened = TensorFile(folder, files)
    if not files:
        with opened._damage(SINGLE):
            opened._open[SINGLE] = _opened(folder / SINGLE)
            files.update(dict.fromkeys(opened._open[SINGLE].keys(), SINGLE))
    for name in {file: name for name, file in files.items()}.values():
        opened.shape(name)
    return opened


@dataclass(slots=True)
class OpenModel:
    """A model opened for streaming: a skeleton without weights, and where its weights are.

    Attributes:
        folder: the folder it came from.
        config: its configuration.
        model: the skeleton, parameters on the meta device (float32), buffers real.
        names: tensor name in the files by name in the model's state dict; tied names point to one tensor.
        tensors: the files.
        parameters: shape by name of every parameter, each tied one once; loading and releasing weights unties the
            skeleton, so this is noted when it is made.
        held: the state dict, if the files could not be mapped name by name and the model was loaded whole.
    """

    folder: Path
    config: Any
    model: PreTrainedModel
    names: dict[str, str]
    tensors: TensorFile
    parameters: dict[str, tuple[int, ...]]
    held: dict[str, Tensor] | None

    def read(self, name: str) -> Tensor:
        """Return the stored tensor behind a name of the model's state dict, in its stored dtype."""
        return self.held[name] if self.held is not None else self.tensors.read(self.names[name])

    def load(self, module: nn.Module, name: str) -> None:
        """Fill a module's own parameters with real weights in float32; the `Load` of a `Blockwise`."""
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                real = self.read(f"{name}.{key}" if name else key).to(torch.float32)
                module._parameters[key] = nn.Parameter(real, requires_grad=False)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype a tensor is stored in."""
        return self.held[name].dtype if self.held is not None else self.tensors.dtype(self.names[name])

    @property
    def numel(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters as stored, tied ones once."""
        return sum(math.prod(shape) * self.stored_dtype(name).itemsize for name, shape in self.parameters.items())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self.held[name].shape) if self.held is not None else self.tensors.shape(self.names[name])

    def buffers(self) -> set[str]:
        """Return the names of the buffers that are stored."""
        return {name for name, _ in self.model.named_buffers()} & set(self.model.state_dict())

    def outside(self, blocks: Sequence[str]) -> list[str]:
        """Return the names of stored parameters and buffers outside the blocks, each tied one once."""
        names = [*self.parameters, *sorted(self.buffers())]
        return [name for name in names if not any(name.startswith(f"{block}.") for block in blocks)]


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a model folder.

    Raises:
        EckartError: if the folder or the file is missing or damaged.
    """
    if not folder.exists():
        raise EckartError(
            f"there is no model folder {folder}; give the path of a folder with config.json and safetensors"
        )
    if not (folder / "config.json").is_file():
        raise EckartError(f"{folder} has no config.json; give the path of a Hugging Face model folder")
    return read_json(folder / "config.json")


def open_model(folder: Path) -> OpenModel:
    """Open a model folder for streaming; no weights are read yet.

    Raises:
        EckartError: if the folder is missing, damaged, already compressed, of an unknown kind, or needs remote code.
    """
    raw = check_model_folder(folder)
    quantized = raw.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        hint = "densify it first (eckart densify)" if method == "eckart" else "start from the full-precision model"
        raise EckartError(f"{folder} is already compressed (quant_method {method!r}); {hint}")
    tensors = tensor_file(folder)
    config, cls = _config_and_class(folder, raw)
    model = _skeleton(cls, config, folder).float().eval()
    model.tie_weights()
    names, unresolved = _resolve(model, tensors)
    held = _load_whole(cls, folder, unresolved) if unresolved else None
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return OpenModel(folder, config, model, names or {name: name for name in held or {}}, tensors, parameters, held)


def with_config(model: OpenModel, raw: dict[str, Any]) -> PreTrainedModel:
    """Return a skeleton of a model's class made from another config.json, its parameters on the meta device.

    Raises:
        EckartError: if no model can be made from it.
    """
    try:
        config = type(model.config).from_dict(raw)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise EckartError(f"no {type(model.model).__name__} can be made with that change: {_reason(error)}") from error
    made = _skeleton(type(model.model), config, model.folder).float().eval()
    made.tie_weights()
    return made


def _reason(error: Exception) -> str:
    """Return the message of another library's error on one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _skeleton(cls: Any, config: Any, folder: Path) -> PreTrainedModel:
    """Build a model without weights, its parameters on the meta device."""
    try:
        with quiet(), init_empty_weights(include_buffers=False):
            made: PreTrainedModel = cls.from_config(config) if cls is AutoModel else cls(config)
    # a config with impossible sizes fails somewhere in the model's own code
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise EckartError(f"no model can be made from {folder / 'config.json'}: {_reason(error)}") from error
    return made


def _config_and_class(folder: Path, raw: dict[str, Any]) -> tuple[Any, Any]:
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        raise EckartError(f"transformers does not understand {folder / 'config.json'}: {_reason(error)}") from error
    architectures = raw.get("architectures") or []
    cls = getattr(transformers, architectures[0], None) if architectures else AutoModel
    if cls is None:
        raise EckartError(
            f"{folder} needs the class {architectures[0]}, which this version of transformers does not have"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise EckartError(f"{architectures[0]} is an encoder-decoder; only decoders and encoders are supported")
    return config, cls


def _resolve(model: PreTrainedModel, tensors: TensorFile) -> tuple[dict[str, str], list[str]]:
    """Map every name of the state dict to a tensor of the files; also return the names that have none."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    shared: dict[int, str] = {}
    out: dict[str, str] = {}
    unresolved = []
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    for name, tensor in wanted.items():
        options = [name, prefix + name, name.removeprefix(prefix) if prefix else name]
        found = next((o for o in options if o in tensors and tensors.shape(o) == tuple(tensor.shape)), None)
        if found is not None:
            out[name] = shared[id(tensor)] = found
    for name, tensor in wanted.items():
        if name not in out and id(tensor) in shared:
            out[name] = shared[id(tensor)]  # tied to a tensor that is there
        elif name not in out:
            unresolved.append(name)
    return ({}, unresolved) if unresolved else (out, [])


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = set(model.state_dict())
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _load_whole(cls: Any, folder: Path, unresolved: list[str]) -> dict[str, Tensor]:
    """Load all weights by transformers' own conversion, for checkpoints with other names or shapes."""
    try:
        with quiet():
            model, info = cls.from_pretrained(folder, dtype="auto", local_files_only=True, output_loading_info=True)
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        raise EckartError(
            f"the weights in {folder} do not fit its config.json, for instance {unresolved[0]} ({_reason(error)}); "
            "download or copy both again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise EckartError(
            f"{folder} lacks the weights {', '.join(missing[:3])} of {cls.__name__} ({len(missing)} in all)"
        )
    warnings.warn(
        f"{folder} names its tensors differently from {cls.__name__} (for instance {unresolved[0]}); "
        "the whole model is held in memory instead of one block",
        stacklevel=4,
    )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def check_finite(model: OpenModel, progress: Progress) -> str:
    """Read every weight once; return a hash of config and weights.

    Raises:
        EckartError: if a tensor holds NaN or Inf, named with the tensor.
    """
    digest = hashlib.sha256((model.folder / "config.json").read_bytes())
    names = sorted(model.names)
    for i, name in enumerate(names):
        progress("check", i, len(names))
        tensor = model.read(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise EckartError(f"{name} in {model.folder} holds {bad} NaN or Inf values; the model is broken")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    progress("check", len(names), len(names))
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own bars and logs for a while."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
