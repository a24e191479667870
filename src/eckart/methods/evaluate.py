"""Measuring a model: a decoder's loss on text, a sentence encoder's rank correlation on scored pairs, a classifier's
accuracy on labelled sentences.

    loss = - sum_i log p(t_i | up to `length` tokens before it) / count,    perplexity = e^loss

Every token but each document's first is scored exactly once. Documents longer than the context are read through windows
that overlap: a window advances by `stride`, and only the tokens that no earlier window scored count, so every scored
token sees at least `length - stride` tokens of its document (or all there are).

Dense folders, compressed folders and loaded models are measured alike, folders with saved adapters on them as well.
"""

import csv
import gzip
import inspect
import math
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eckart.errors import EckartError
from eckart.files.folder import check_model_folder, quiet, tensor_file
from eckart.files.huggingface import register
from eckart.files.text import encode_document, load_tokenizer, read_documents
from eckart.methods.adapt.folding import put_adapters
from eckart.methods.classification import evaluate_classifier, labelled_rows, load_classifier
from eckart.methods.evaluation import Evaluation
from eckart.progress import Progress, silent

# Longest window chosen without being asked: models with a context of 100,000 tokens would need hours and gigabytes.
LONGEST_DEFAULT = 2048
# Tokens per forward pass; bounds the memory of the logits.
TOKENS_PER_BATCH = 2048
PAIR_COLUMNS = ("sentence1", "sentence2", "score")


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a document that goes through the model at once.

    Attributes:
        document: index of the document.
        ids: its tokens; the last one is only a target.
        scored: how many of the last targets count.
    """

    document: int
    ids: Sequence[int]
    scored: int


def evaluate(
    model: str | Path | PreTrainedModel,
    *,
    text: str | Path | None = None,
    pairs: str | Path | None = None,
    labelled: str | Path | None = None,
    text_field: str = "text",
    label_field: str = "label",
    adapters: Sequence[str | Path] = (),
    length: int | None = None,
    stride: int | None = None,
    batch: int = TOKENS_PER_BATCH,
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a decoder on text, a sentence encoder on scored pairs, or a classifier on labelled sentences.

    Computes in float32 on CPU, or in the model's own dtype on an accelerator if there is one. A loaded model is used as
    it is, where it is.

    Args:
        model: folder, dense or compressed, or a loaded model.
        text: text file for a decoder: documents as in `eckart.files.text`.
        pairs: tab-separated file for an encoder, plain or gzip, with the columns sentence1, sentence2 and score.
        labelled: rows in a .jsonl or .tsv file, plain or gzip, for a model that classifies.
        text_field: field or column of a labelled sentence.
        label_field: the same of its label.
        adapters: folders of saved adapters to put on a folder's model, all of them, composed in this order.
        length: tokens a window reads, by default the context, 2048 at most; for an encoder, where sentences are cut.
        stride: tokens a window advances; by default half the length.
        batch: tokens per forward pass.
        limit: only the first documents, pairs or labelled sentences.
        tokenizer: that of a loaded model, if the folder it came from is gone.
        progress: called with the tokens done.

    Raises:
        EckartError: for a missing or damaged file, a model of another kind, or a text with nothing to score.
    """
    if sum(source is not None for source in (text, pairs, labelled)) != 1:
        raise EckartError("give one of text (for a decoder), pairs (for an encoder) and labelled (for a classifier)")
    _check_counts(length=length, stride=stride, batch=batch, limit=limit)
    if stride is not None and text is None:
        raise EckartError("stride is for text; sentences are read whole")
    folders = [Path(each) for each in ([adapters] if isinstance(adapters, str | Path) else adapters)]
    loaded = _with_adapters(model, folders, classifies=labelled is not None)
    vocabulary = tokenizer or load_tokenizer(_origin(model))
    training = loaded.training
    loaded.eval()
    try:
        if labelled is not None:
            rows = labelled_rows(loaded, vocabulary, Path(labelled), text_field, label_field, length, limit)
            return evaluate_classifier(loaded, rows)
        require_kind(loaded, decoder=text is not None)
        if text is not None:
            documents = read_documents(Path(text))[:limit]
            return _evaluate_decoder(loaded, vocabulary, documents, length, stride, batch, progress)
        return _evaluate_encoder(loaded, vocabulary, read_pairs(Path(str(pairs)))[:limit], length, batch, progress)
    finally:
        loaded.train(training)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise EckartError(f"{name} must be at least 1, got {value}")


def _with_adapters(model: str | Path | PreTrainedModel, adapters: Sequence[Path], classifies: bool) -> PreTrainedModel:
    """Return a model given as it is, or load it with adapters."""
    if not isinstance(model, str | Path):
        if adapters:
            raise EckartError("adapters are for a folder's model; put them on a loaded one with eckart.load_adapter")
        return model
    loaded = load_classifier(Path(model), adapters) if classifies else load(Path(model))
    if adapters:
        put_adapters(loaded, adapters)
    return loaded


def load(folder: Path) -> PreTrainedModel:
    """Load a folder for measuring: on the accelerator in its own dtype if there is one, otherwise on CPU in float32.

    Raises:
        EckartError: if the folder is missing, damaged, incomplete or unknown to transformers.
    """
    raw = check_model_folder(folder)
    tensor_file(folder)  # finds truncated files and missing shards
    register()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    architectures = raw.get("architectures") or [""]
    auto = AutoModelForCausalLM if _is_causal(architectures[0]) else AutoModel
    dtype: Any = torch.float32 if device is None else "auto"
    try:
        with quiet():
            model, info = auto.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except EckartError:
        raise
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise EckartError(f"transformers cannot load {folder}: {reason}") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))  # not every BERT has one
    if missing:
        raise EckartError(f"{folder} lacks the weights {', '.join(missing[:3])} ({len(missing)} in all)")
    return model if device is None else model.to(device)


def require_kind(model: nn.Module, *, decoder: bool) -> None:
    """Raise an `EckartError` if a decoder was given pairs, or anything else text."""
    name = _class_name(model)
    if decoder and not _is_causal(name):
        raise EckartError(
            f"{name} does not predict next tokens, so text cannot be scored; give --pairs for a sentence encoder"
        )
    if not decoder and _is_causal(name):
        raise EckartError(f"{name} is a decoder, so sentence pairs cannot be compared; give --text")


def _class_name(model: nn.Module) -> str:
    inner = getattr(model, "get_base_model", None)  # what adapters are wrapped around
    return type(inner() if callable(inner) else model).__name__


def _is_causal(name: str) -> bool:
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _origin(model: str | Path | PreTrainedModel) -> Path:
    folder = Path(model if isinstance(model, str | Path) else getattr(model, "name_or_path", "") or "")
    if not folder.is_dir() or folder == Path():
        raise EckartError("the model's folder is not known, so neither is its tokenizer; give tokenizer=")
    return folder


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read at once, or None if its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def _window_sizes(model: PreTrainedModel, length: int | None, stride: int | None) -> tuple[int, int]:
    context = context_length(model)
    if length is not None and context is not None and length > context:
        raise EckartError(f"length {length} exceeds the model's context of {context} tokens; give at most that")
    length = length or min(context or LONGEST_DEFAULT, LONGEST_DEFAULT)
    stride = stride or max(1, length // 2)
    if stride > length:
        raise EckartError(
            f"stride {stride} exceeds the length of {length}, which would leave tokens out; give at most that"
        )
    return length, stride


def _evaluate_decoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    length: int | None,
    stride: int | None,
    batch: int,
    progress: Progress,
) -> Evaluation:
    length, stride = _window_sizes(model, length, stride)
    encoded = [encode_document(tokenizer, document) for document in documents]
    tokens = sum(max(len(ids) - 1, 0) for ids in encoded)
    if tokens == 0:
        raise EckartError(
            f"the text has {sum(map(len, encoded))} tokens, and the first of a document is not scored; give more"
        )
    started = time.perf_counter()
    nats = float(document_nats(model, encoded, length=length, stride=stride, batch=batch, progress=progress).sum())
    seconds = time.perf_counter() - started
    if not math.isfinite(nats):
        raise EckartError(
            f"{_class_name(model)} gives NaN or infinite losses on this text; its weights or its dtype are at fault"
        )
    per_token, size = nats / tokens, sum(len(document.encode()) for document in documents)
    return Evaluation(
        tokens=tokens,
        seconds=seconds,
        documents=len(documents),
        nats_per_token=per_token,
        perplexity=math.exp(per_token) if per_token < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / size,
    )


def windows_of(document: int, ids: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows in which every token but the first is scored exactly once.

    Args:
        document: its index.
        ids: its tokens.
        length: tokens a window reads.
        stride: tokens the first full window and later ones advance, at most `length`.
    """
    targets, done = len(ids) - 1, 0  # target i is token i + 1, predicted from the tokens up to i
    while done < targets:
        end = min(done + stride, targets) if done else min(length, targets)
        begin = max(0, end - length)  # the last window reaches back, so that it has as much context as the others
        yield Window(document, ids[begin : end + 1], end - done)
        done = end


@torch.no_grad()
def document_nats(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    stride: int,
    batch: int = TOKENS_PER_BATCH,
    progress: Progress = silent,
) -> Tensor:
    """Return the summed negative log-likelihood of each document, in nats.

    Args:
        model: a decoder in evaluation mode.
        documents: token ids, start token included.
        length: tokens a window reads.
        stride: tokens a window advances.
        batch: tokens per forward pass.
        progress: called with the tokens done.

    Returns:
        (documents,) float64, on CPU.
    """
    groups: dict[tuple[int, int], list[Window]] = defaultdict(list)  # equal lengths need no padding
    for index, ids in enumerate(documents):
        for window in windows_of(index, ids, length, stride):
            groups[len(window.ids), window.scored].append(window)
    total, done = sum(w.scored for group in groups.values() for w in group), 0
    out = torch.zeros(len(documents), dtype=torch.float64)
    trims = "logits_to_keep" in inspect.signature(model.forward).parameters
    for (size, scored), group in groups.items():
        for some in _chunks(group, max(1, batch // size)):
            progress("evaluate", done, total)
            batched = torch.tensor([window.ids for window in some], dtype=torch.int64, device=model.device)
            kept = {"logits_to_keep": scored} if trims else {}
            logits = model(input_ids=batched[:, :-1], use_cache=False, **kept).logits[:, -scored:]
            losses = F.cross_entropy(logits.float().mT, batched[:, -scored:], reduction="none")  # (b, scored)
            out.index_add_(0, torch.tensor([w.document for w in some]), losses.double().sum(-1).cpu())
            done += scored * len(some)
    progress("evaluate", total, total)
    return out


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Return the rows of a tab-separated file, plain or gzip, as (sentence1, sentence2, score).

    Raises:
        EckartError: if the file is missing or unreadable, lacks a column, or a score is not a number.
    """
    if not path.is_file():
        raise EckartError(f"there is no file of sentence pairs {path}")
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise EckartError(f"{path} is not tab-separated UTF-8 text, plain or gzip ({error})") from error
    lacking = [name for name in PAIR_COLUMNS if not rows or name not in rows[0]]
    if lacking:
        raise EckartError(
            f"{path} needs rows under a first line naming sentence1, sentence2 and score; {lacking[0]} is not there"
        )
    out = []
    for number, row in enumerate(rows, 2):
        try:
            first, second, score = (row[name] for name in PAIR_COLUMNS)
            out.append((str(first), str(second), float(score)))
        except (TypeError, ValueError) as error:
            raise EckartError(f"{path} line {number} has the score {row['score']!r}, which is not a number") from error
    return out


def _evaluate_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, str, float]],
    length: int | None,
    batch: int,
    progress: Progress,
) -> Evaluation:
    limit = min(n for n in (context_length(model), tokenizer.model_max_length) if n)
    if length is not None and length > limit:
        raise EckartError(f"length {length} exceeds the encoder's longest input of {limit} tokens; give at most that")
    texts = [sentence for first, second, _ in rows for sentence in (first, second)]
    encoded = [_cut(encode_document(tokenizer, sentence), length or limit) for sentence in texts]
    if not all(encoded):
        raise EckartError("a sentence has no tokens; remove empty sentences from the pairs")
    started = time.perf_counter()
    vectors = embeddings(model, encoded, batch=batch, progress=progress)
    seconds = time.perf_counter() - started
    cosines = (vectors[0::2] * vectors[1::2]).sum(-1)
    return Evaluation(
        tokens=sum(map(len, encoded)),
        seconds=seconds,
        pairs=len(rows),
        spearman=_spearman(cosines, torch.tensor([score for _, _, score in rows], dtype=torch.float64)),
    )


def _cut(ids: list[int], length: int) -> list[int]:
    # The last token stays: it is the separator that the model was trained to see.
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _spearman(a: Tensor, b: Tensor) -> float:
    try:
        from scipy.stats import spearmanr
    except ModuleNotFoundError as error:
        raise EckartError("scoring sentence pairs needs scipy; install it with: pip install 'eckart[eval]'") from error
    for name, values in (("similarities", a), ("scores", b)):
        if not torch.isfinite(values).all() or bool((values == values[0]).all()):
            raise EckartError(
                f"the {name} of the {values.numel()} pairs are equal or not finite, so they have no ranks"
            )
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


@torch.no_grad()
def embeddings(
    model: PreTrainedModel,
    sentences: Sequence[Sequence[int]],
    *,
    batch: int = TOKENS_PER_BATCH,
    progress: Progress = silent,
) -> Tensor:
    """Return the mean of a sentence's last hidden states, normalized to length 1.

    Args:
        model: an encoder in evaluation mode.
        sentences: token ids, special tokens included; each at least one.
        batch: tokens per forward pass; batches hold sentences of equal length, so that nothing is padded.
        progress: called with the tokens done.

    Returns:
        (sentences, width) float64, on CPU.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(sentences):
        groups[len(ids)].append(index)
    total, done, rows = sum(map(len, sentences)), 0, dict[int, Tensor]()
    for size, group in groups.items():
        for some in _chunks(group, max(1, batch // size)):
            progress("evaluate", done, total)
            batched = torch.tensor([sentences[i] for i in some], dtype=torch.int64, device=model.device)
            hidden = model(input_ids=batched, attention_mask=torch.ones_like(batched)).last_hidden_state
            rows.update(zip(some, F.normalize(hidden.double().mean(1), dim=-1).cpu(), strict=True))
            done += batched.numel()
    progress("evaluate", total, total)
    return torch.stack([rows[i] for i in range(len(sentences))])
