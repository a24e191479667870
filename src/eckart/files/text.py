"""Texts for calibration and evaluation: documents from a file, and token ids cut from them.

A text file (plain or gzip, UTF-8) is one document, or several separated by lines or marks `<|endoftext|>`. A .jsonl
file holds one document per line under "text". Every document is encoded alone, with the tokenizer's own start token.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eckart.errors import EckartError
from eckart.files.folder import quiet

SEPARATOR = "<|endoftext|>"
# Calibration samples where no number is asked for: windows of running text, lines for sentence encoders.
WINDOWS = 128
LINES = 2048
# Tokens of a window where no number is asked for.
LENGTH = 256


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        EckartError: if the folder has none.
    """
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:160]
        raise EckartError(
            f"{folder} has no usable tokenizer ({reason}); copy tokenizer.json beside the weights"
        ) from error


def read_text(path: Path) -> str:
    """Return what a text file holds, plain or gzip.

    Raises:
        EckartError: if the file is missing or not readable as UTF-8 text.
    """
    if not path.is_file():
        raise EckartError(f"there is no text file {path}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise EckartError(f"{path} is not UTF-8 text, plain or gzip ({error})") from error


def read_documents(path: Path) -> list[str]:
    """Return the documents of a text file, stripped, empty ones left out.

    Raises:
        EckartError: if the file is missing, not readable as UTF-8 text, or empty.
    """
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        pieces = list(_jsonl(path, text))
    else:
        pieces = text.split(SEPARATOR)
    documents = [piece.strip() for piece in pieces if piece.strip()]
    if not documents:
        raise EckartError(f"{path} holds no text")
    return documents


def _jsonl(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                document = None
            if not isinstance(document, str):
                raise EckartError(f'{path} line {number} is not a JSON object with a "text" field')
            yield document


def read_records(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a .jsonl file or of a table with tabs and a header, fields as text.

    Raises:
        EckartError: if the file is missing, not readable, empty, or a row lacks a field.
    """
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    rows: list[Mapping[str, Any]] = []
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise EckartError(f"{path} line {number} is not JSON ({error})") from error
            rows.append(row if isinstance(row, dict) else {})
    elif lines:
        header = lines[0].split("\t")
        rows = [dict(zip(header, line.split("\t"), strict=False)) for line in lines[1:]]
    if not rows:
        raise EckartError(f"{path} holds no rows")
    for number, row in enumerate(rows, 1):
        lacking = next((field for field in fields if field not in row), None)
        if lacking is not None:
            there = ", ".join(map(str, row)) or "none"
            raise EckartError(f"row {number} of {path} has no field {lacking!r}; it has {there}")
    return [{field: str(row[field]) for field in fields} for row in rows]


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids for a calibration run.

    Attributes:
        batches: calibration samples (b, t), no padding, equal lengths within a batch.
        held_out: samples of the same kind, for measuring the loss before and after.
        disjoint: False if the text was too short for held-out samples, and calibration samples stand in.
    """

    batches: list[Tensor]
    held_out: list[Tensor]
    disjoint: bool

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return sum(batch.numel() for batch in self.batches)


def windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    samples: int | None,
    length: int,
    batch: int,
    usual: int = WINDOWS,
    held_out: int = 16,
) -> Samples:
    """Pack documents one after the other and cut windows of equal length, for models that read running text.

    Args:
        tokenizer: encodes each document with its own special tokens.
        documents: the texts, used in order.
        samples: number of windows for calibration; None for `usual`, or fewer if the text is shorter.
        length: tokens per window.
        batch: windows per batch.
        usual: windows where no number is asked for.
        held_out: windows after those, for measuring.

    Raises:
        EckartError: if the text does not fill the calibration windows asked for, or not one.
    """
    wanted = ((samples or usual) + held_out) * length
    ids: list[int] = []
    for document in documents:
        ids += encode_document(tokenizer, document)
        if len(ids) >= wanted:
            break
    full = len(ids) // length
    if full < (samples or 1):
        hint = f"use --samples {full} or a longer text" if full else "give a longer text or a smaller --length"
        raise EckartError(
            f"the calibration text has {len(ids)} tokens, but {samples or 1} samples of {length} need "
            f"{(samples or 1) * length}; {hint}"
        )
    count = samples or _share(full, usual, held_out)
    cut = torch.tensor(ids[: full * length], dtype=torch.int64).view(-1, length)
    left = cut[count : count + held_out]
    own = left.shape[0] == 0
    measured = cut[: min(count, held_out)] if own else left
    return Samples(list(cut[:count].split(batch)), list(measured.split(batch)), not own)


def sentences(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    samples: int | None,
    length: int,
    tokens_per_batch: int,
    held_out: int = 128,
    tokens: int = 0,
    seed: int = 0,
) -> Samples:
    """Encode lines one by one, each a sample cut at `length` tokens, for sentence encoders; batches hold equal lengths.

    The lines are drawn from the whole text without replacement, since collections of sentences are often sorted by
    where they come from. The same seed draws the same lines, and fewer of them where fewer are asked for.

    Args:
        tokenizer: encodes each line with its own special tokens.
        documents: the texts; every non-empty line is a sample.
        samples: number of lines for calibration; None for `LINES` (or `tokens`), or fewer if the text is shorter.
        length: longest sample in tokens.
        tokens_per_batch: bound on the tokens of a batch.
        held_out: lines drawn besides those, for measuring.
        tokens: that are to be had where no number of lines is asked for, which then are at least `LINES`.
        seed: seed of the draw.

    Raises:
        EckartError: if there are fewer lines than asked for.
    """
    lines = [line.strip() for document in documents for line in document.splitlines() if line.strip()]
    if len(lines) < (samples or 1):
        raise EckartError(
            f"the calibration text has {len(lines)} lines, but {samples} samples are asked for; "
            f"use --samples {len(lines)}"
        )
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = (encode_document(tokenizer, lines[at])[:length] for at in order)
    encoded: list[list[int]] = []
    most, total = samples or _share(len(lines), len(lines) if tokens else LINES, held_out), 0
    while len(encoded) < most and (samples or len(encoded) < LINES or total < tokens):
        encoded.append(next(drawn))
        total += len(encoded[-1])
    count = len(encoded)
    encoded += itertools.islice(drawn, held_out)
    left = encoded[count:]
    return Samples(
        _by_length(encoded[:count], tokens_per_batch),
        _by_length(left or encoded[:held_out], tokens_per_batch),
        bool(left),
    )


def _share(available: int, wanted: int, held_out: int) -> int:
    """Return how many of the available samples to calibrate on where no number was asked for."""
    return max(1, min(wanted, available - min(held_out, available // 8)))


def _by_length(encoded: Sequence[list[int]], tokens_per_batch: int) -> list[Tensor]:
    groups: dict[int, list[list[int]]] = {}
    for ids in encoded:
        groups.setdefault(len(ids), []).append(ids)
    out: list[Tensor] = []
    for size in sorted(groups):
        out += torch.tensor(groups[size], dtype=torch.int64).split(max(1, tokens_per_batch // size))
    return out


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a document's token ids with its special tokens, a start token first if the tokenizer defines one."""
    encoded: Any = tokenizer(text, add_special_tokens=True, truncation=False, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    start = tokenizer.bos_token_id
    return ids if start is None or (ids and ids[0] == start) else [start, *ids]
