"""What a folder gives in a process that took no part in its making.

    python -m eckart.methods.reload ORDER.json

loads the folder by `from_pretrained`, answers some samples, takes the time, and writes what it found beside the order;
whoever ordered it judges.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from eckart.files.folder import check_model_folder, quiet
from eckart.files.huggingface import register
from eckart.hosts import EmbeddingHost, Host
from eckart.hosts.memory import return_memory
from eckart.hosts.timing import medians

# Bytes of dense float32 weights up to which both models are held, so that they take turns while they are timed.
TOGETHER = 2 << 30
PROMPT, NEW_TOKENS = 8, 16
# LOADING lies there while the folder is being loaded; a process that ended and left it could not load the folder.
LOADING, ANSWERS, FINDINGS = "loading", "answers.safetensors", "findings.json"


@dataclass(frozen=True, slots=True)
class Order:
    """What to load and what to ask of it; paths as texts.

    Attributes:
        folder: the compressed folder.
        dense: the original folder.
        dense_numbers: parameters of the original.
        samples: safetensors file of token ids (b, t), one tensor per batch, in the order of their names.
        positions: how many of the last positions of every sample are answered for.
        threads: threads to compute with.
        device: where to compute.
    """

    folder: str
    dense: str
    dense_numbers: int
    samples: str
    positions: int
    threads: int
    device: str


def answers_of(output: Any, positions: int) -> Tensor:
    """Return the first item of a model's output, logits or hidden states, at the last positions, float32 on CPU."""
    first: Tensor = output[0]
    return first[:, -positions:].float().cpu().contiguous()


@torch.no_grad()
def run(order_file: Path) -> None:
    """Carry out an order; answers and findings are written into its folder."""
    order = Order(**json.loads(order_file.read_text(encoding="utf-8")))
    torch.set_num_threads(order.threads)
    samples = [ids for _, ids in sorted(load_file(order.samples, device=order.device).items())]
    loading = order_file.with_name(LOADING)
    loading.touch()
    model, faults = _loaded(order.folder, order.device)
    loading.unlink()
    answers = [answers_of(model(input_ids=ids), order.positions) for ids in samples]
    save_file({f"{i:04d}": found for i, found in enumerate(answers)}, order_file.with_name(ANSWERS))
    numbers, index_bytes = _held(model)
    together = 4 * order.dense_numbers <= TOGETHER
    models = {"compressed": model}
    if together:
        models["dense"] = _loaded(order.dense, order.device)[0]
    seconds = _seconds(models, samples[-1][:1])
    if not together:
        models.clear()
        del model
        return_memory()
        dense = _seconds({"dense": _loaded(order.dense, order.device)[0]}, samples[-1][:1])
        seconds = {task: {**seconds[task], **dense[task]} for task in seconds}
    findings = {"faults": faults, "numbers": numbers, "index_bytes": index_bytes, "seconds": seconds}
    order_file.with_name(FINDINGS).write_text(json.dumps(findings), encoding="utf-8")


def _loaded(folder: str, device: str) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """Return a model in float32, and the tensors that were missing, left over or of another shape."""
    architectures = check_model_folder(Path(folder)).get("architectures") or [""]
    cls = getattr(transformers, architectures[0], AutoModel) if architectures[0] else AutoModel
    with quiet():
        model, info = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.to(device).eval(), {kind: sorted(map(str, info[kind])) for kind in kinds}


def _held(model: PreTrainedModel) -> tuple[int, int]:
    """Return the numbers of a model's parameters and the bytes of its hosts' index tensors, shared ones once."""
    hosts = [module for module in model.modules() if isinstance(module, Host | EmbeddingHost)]
    buffers = {id(buffer): buffer for module in hosts for buffer in module.buffers(recurse=False)}
    return sum(p.numel() for p in model.parameters()), sum(b.nbytes for b in buffers.values())


def _seconds(models: Mapping[str, PreTrainedModel], sample: Tensor) -> dict[str, dict[str, float]]:
    """Return the median seconds per token of reading a sample and, for decoders, of generating, by task and model."""

    def reading(model: PreTrainedModel) -> Callable[[], object]:
        return lambda: model(input_ids=sample)

    def generating(model: PreTrainedModel) -> Callable[[], object]:
        prompt = sample[:, :PROMPT]
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        return lambda: model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length
        )

    tasks = {"reading": (reading, sample.shape[1])}
    contexts = [getattr(model.config, "max_position_embeddings", None) for model in models.values()]
    room = all(context is None or context >= PROMPT + NEW_TOKENS for context in contexts)
    if room and all(model.can_generate() for model in models.values()):
        tasks["generating"] = (generating, NEW_TOKENS)
    out = {}
    for name, (task, tokens) in tasks.items():
        times = medians({key: task(model) for key, model in models.items()})
        out[name] = {key: seconds / tokens for key, seconds in times.items()}
    return out


if __name__ == "__main__":
    register()
    run(Path(sys.argv[1]))
