"""Measuring models that classify sentences, on labelled rows in terms of their classes."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.errors import EckartError
from eckart.files.folder import check_model_folder
from eckart.files.huggingface import register
from eckart.methods.adapt.calibration import calibration_error
from eckart.methods.adapt.folding import class_names
from eckart.methods.adapt.tasks import Examples, answers, load_task_model, read_examples
from eckart.methods.evaluation import Evaluation

# Tokens at which sentences are cut where no length is given and the model states none.
LONGEST = 512


def load_classifier(folder: Path, adapters: Sequence[Path] = ()) -> PreTrainedModel:
    """Load a folder that classifies, or that does with one of the adapters: in float32 on CPU, as stored elsewhere.

    Raises:
        EckartError: if neither has a head for classes.
    """
    raw = check_model_folder(folder)
    register()
    names = class_names(adapters)
    if not names:
        names = tuple(name for _, name in sorted((int(k), v) for k, v in raw.get("id2label", {}).items()))
        architecture = str((raw.get("architectures") or [""])[0])
        if not architecture.endswith("ForSequenceClassification"):
            raise EckartError(f"{folder} is a {architecture}, which has no head for classes; give the adapter with one")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model, new = load_task_model(folder, names or ("LABEL_0", "LABEL_1"), torch.float32 if device is None else "auto")
    if new and not adapters:
        raise EckartError(f"{folder} lacks the weights of {new[0]}, so that its classes would be random")
    return model if device is None else model.to(device)


def labelled_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    text_field: str,
    label_field: str,
    length: int | None,
    limit: int | None,
) -> Examples:
    """Read labelled sentences as examples of a model's classes, whose names its config has.

    Classes without names of their own (LABEL_0, LABEL_1 ...) are those of the file, in order, if they are as many.

    Raises:
        EckartError: for a model without classes, other labels than its own, or a file that cannot be read.
    """
    names = [name for _, name in sorted(getattr(model.config, "id2label", {}).items())]
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise EckartError(f"{type(model).__name__} has no classes; give text or pairs instead of labelled rows")
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    longest = min(n for n in (context, tokenizer.model_max_length, LONGEST) if n)
    rows = read_examples(
        tokenizer, path, length=length or longest, text_field=text_field, label_field=label_field,
        labels=() if unnamed else names,
    )  # fmt: skip
    if len(rows.labels) != len(names):
        raise EckartError(f"{path} has the labels {', '.join(rows.labels)}, but the model has {len(names)} classes")
    return Examples(rows.rows[:limit], rows.labels)


def evaluate_classifier(model: PreTrainedModel, examples: Examples) -> Evaluation:
    """Measure a classifier on examples of its classes."""
    started = time.perf_counter()
    logits, labels = answers(model, examples)
    return Evaluation(
        tokens=int(examples.rows[:, 1].sum()),
        seconds=time.perf_counter() - started,
        examples=len(labels),
        nats_per_example=float(F.cross_entropy(logits, labels)),
        accuracy=float((logits.argmax(-1) == labels).double().mean()),
        calibration_error=calibration_error(logits, labels),
    )
