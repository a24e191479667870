"""What a fine-tune learns and how it is measured: the next tokens of texts, or the labels of sentences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from eckart.errors import EckartError
from eckart.files.folder import check_model_folder, quiet
from eckart.files.text import encode_document, read_documents, read_records

# Share of the data that is held out to measure on where no file is given for it, and the most examples of it.
HELD_OUT, MOST_HELD_OUT = 0.1, 512
# Examples measured at once.
BATCH = 16


@dataclass(frozen=True, slots=True)
class Examples:
    """What a task trains or is measured on.

    Attributes:
        rows: one example each, (count, width) int64: token ids of a window; or label, number of tokens, padded ids.
        labels: the names of the classes, in the order of their numbers; none for texts.
    """

    rows: Tensor
    labels: tuple[str, ...] = ()

    def split(self, seed: int) -> tuple["Examples", "Examples"]:
        """Return what to train on and what to measure on: the last part of a text, labelled rows drawn from all.

        Tables are often sorted by label, and windows of a text beside one another say nearly the same.

        Raises:
            EckartError: if there is a single example.
        """
        held = min(MOST_HELD_OUT, int(len(self.rows) * HELD_OUT)) or 1
        if len(self.rows) < 2:
            raise EckartError("the data gives a single example; give more, or a validation file")
        rows = self.drawn(len(self.rows), seed) if self.labels else self.rows
        return Examples(rows[:-held], self.labels), Examples(rows[-held:], self.labels)

    def drawn(self, count: int, seed: int) -> Tensor:
        """Return rows drawn from all, `count` or as many as there are; the same seed draws the same."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))
        return self.rows[order[:count]]


def read_examples(
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    length: int,
    text_field: str,
    label_field: str | None,
    labels: Sequence[str] = (),
) -> Examples:
    """Read texts as windows of tokens, or labelled sentences.

    Args:
        tokenizer: of the model.
        path: text (plain or gzip, documents separated as elsewhere), .jsonl, or a table with tabs and a header.
        length: tokens of a window, and the most of a sentence.
        text_field: name of the text's field or column.
        label_field: name of the label's; None for texts without labels.
        labels: names of the classes where they are known; otherwise those found, in order.

    Raises:
        EckartError: for a file that cannot be read, lacks a field, or holds too little.
    """
    if label_field is None:
        fields = path.name.removesuffix(".gz").endswith(".tsv") or text_field != "text"
        documents = [row[text_field] for row in read_records(path, (text_field,))] if fields else read_documents(path)
        return _windows(tokenizer, documents, length, path)
    rows = read_records(path, (text_field, label_field))
    known = tuple(labels) or tuple(sorted({row[label_field] for row in rows}))
    if len(known) < 2:
        raise EckartError(f"{path} has {len(known)} kind of {label_field!r}; a classification needs two at least")
    unknown = next((row[label_field] for row in rows if row[label_field] not in known), None)
    if unknown is not None:
        raise EckartError(f"{path} has the label {unknown!r}, which the training data does not have")
    encoded = [tokenizer(row[text_field], truncation=True, max_length=length)["input_ids"] for row in rows]
    width = max(len(ids) for ids in encoded)
    packed = torch.zeros(len(rows), 2 + width, dtype=torch.int64)
    for i, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
        packed[i, 0], packed[i, 1] = known.index(row[label_field]), len(ids)
        packed[i, 2 : 2 + len(ids)] = torch.tensor(ids)
    return Examples(packed, known)


def _windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, path: Path) -> Examples:
    ids = [token for document in documents for token in encode_document(tokenizer, document)]
    count = len(ids) // length
    if count == 0:
        raise EckartError(f"{path} has {len(ids)} tokens, too few for one window of {length}; give more text")
    return Examples(torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length))


def load_task_model(
    folder: Path, labels: Sequence[str], dtype: torch.dtype | Literal["auto"] = torch.float32
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a model folder for its task: with a head for the classes, or to predict next tokens.

    Returns:
        the model, and the modules whose weights the folder lacks, drawn anew: some architectures have more of a head
        than the last layer (a pooler, DistilBERT's `pre_classifier`).

    Args:
        folder: of the model.
        labels: names of the classes; none to predict next tokens.
        dtype: of the weights; "auto" for the stored one.

    Raises:
        EckartError: if the folder is none of a model, lacks weights, or its architecture has no such head.
    """
    check_model_folder(folder)
    try:
        with quiet():
            if labels:
                names = dict(enumerate(labels))
                made, info = AutoModelForSequenceClassification.from_pretrained(
                    folder, num_labels=len(labels), id2label=names, label2id={v: k for k, v in names.items()},
                    local_files_only=True, dtype=dtype, output_loading_info=True,
                )  # fmt: skip
            else:
                made, info = AutoModelForCausalLM.from_pretrained(
                    folder, local_files_only=True, dtype=dtype, output_loading_info=True
                )
    except (ValueError, KeyError) as error:
        task = "classification" if labels else "predicting next tokens"
        raise EckartError(f"{folder} is of an architecture without a head for {task} ({error})") from error
    model: PreTrainedModel = made.eval()
    _require_weights(folder, model, info["missing_keys"], bool(labels))
    if labels and model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    return model, _outermost(model, info["missing_keys"])


def _outermost(model: PreTrainedModel, missing: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that hold missing weights: whole ones beside the base model, single layers inside of it."""
    inside = f"{model.base_model_prefix}."
    names = {n.rpartition(".")[0] if n.startswith(inside) else n.partition(".")[0] for n in missing}
    return tuple(sorted(names))


def _require_weights(folder: Path, model: PreTrainedModel, missing: Iterable[str], classifies: bool) -> None:
    """Refuse a model that does not predict next tokens where it should, and weights that were drawn for lost ones."""
    architecture = (getattr(model.config, "architectures", None) or [""])[0]
    inside = sorted(n for n in missing if n.startswith(f"{model.base_model_prefix}.") and ".pooler." not in n)
    if inside:
        raise EckartError(f"{folder} lacks the weights {', '.join(inside[:3])} ({len(inside)} in all)")
    if not classifies and (list(missing) or architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()):
        raise EckartError(f"{folder} was not trained to predict next tokens; give a label field to classify with it")


def batch_of(rows: Tensor, labels: Sequence[str]) -> dict[str, Tensor]:
    """Return what the model is called with, without the labels of texts' own tokens doubled."""
    if not labels:
        return {"input_ids": rows, "labels": rows}
    lengths = rows[:, 1]
    ids = rows[:, 2 : 2 + int(lengths.max())]
    mask = torch.arange(ids.shape[1], device=rows.device)[None] < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": rows[:, 0]}


@torch.no_grad()
def answers(model: nn.Module, examples: Examples) -> tuple[Tensor, Tensor]:
    """Return the logits (count, classes) of labelled examples, float32, and their labels (count,), on the CPU."""
    training = model.training
    model.eval()
    device, logits = next(model.parameters()).device, []
    for rows in examples.rows.split(BATCH):
        batch = batch_of(rows.to(device), examples.labels)
        del batch["labels"]
        logits.append(model(**batch).logits.float().cpu())
    model.train(training)
    return torch.cat(logits), examples.rows[:, 0]


@torch.no_grad()
def measured(model: nn.Module, examples: Examples) -> dict[str, float]:
    """Return {"loss": nats per token} of texts, or {"loss": nats per example, "accuracy"} of labelled ones."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, right, count = 0.0, 0, 0
    for rows in examples.rows.split(BATCH):
        batch = batch_of(rows.to(device), examples.labels)
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        if examples.labels:
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
        else:
            total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
            count += labels[:, 1:].numel()
    model.train(training)
    return {"loss": total / count, **({"accuracy": right / count} if examples.labels else {})}
