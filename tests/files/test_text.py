"""Texts become token ids: documents are told apart, nothing is padded, and too little text is said."""

import gzip
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast

from eckart.errors import EckartError
from eckart.files.text import LINES, WINDOWS, encode_document, load_tokenizer, read_documents, sentences, windows

DEMO = Path(str(files("eckart"))) / "demo" / "stories260k"
STORIES = ["Once upon a time, there was a cat.", "The dog ran home.\nHe was happy.", "Tom saw a big tree."]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of encoders: [CLS] words [SEP], no start token."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    return BertTokenizerFast(str(path))


def ids_of(tokenizer, documents: list[str]) -> list[int]:
    return [i for document in documents for i in encode_document(tokenizer, document)]


@pytest.mark.parametrize("separator", ["\n<|endoftext|>\n", "<|endoftext|>", "<|endoftext|>\n\n<|endoftext|>"])
def test_documents_are_split_at_marks(tmp_path, separator):
    (tmp_path / "a.txt").write_text(separator.join(STORIES) + separator)
    assert read_documents(tmp_path / "a.txt") == STORIES


def test_a_file_without_marks_is_one_document(tmp_path):
    (tmp_path / "a.md").write_text("one\n\ntwo\n")
    assert read_documents(tmp_path / "a.md") == ["one\n\ntwo"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_gzip_and_json_lines(tmp_path, name):
    lines = "\n".join(json.dumps({"text": s, "id": 1}) for s in STORIES) + "\n\n"
    content = (lines if "jsonl" in name else "<|endoftext|>".join(STORIES)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_documents(tmp_path / name) == STORIES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n<|endoftext|>\n", "holds no text"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text, plain or gzip"),
        ("a.gz", b"plain", "is not UTF-8 text, plain or gzip"),
        ("a.gz", gzip.compress(b"text" * 100)[:-9], "is not UTF-8 text, plain or gzip"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', 'line 2 is not a JSON object with a "text" field'),
        ("a.jsonl", b'{"text": "x"}\n\n[', 'line 3 is not a JSON object with a "text" field'),
        ("a.jsonl", b'{"text": null}', 'line 1 is not a JSON object with a "text" field'),
    ],
)
def test_files_that_are_no_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EckartError, match=message):
        read_documents(tmp_path / name)


def test_a_damaged_gzip_stream(tmp_path):
    content = bytearray(gzip.compress(b"some text " * 1000))
    content[15] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(EckartError, match="is not UTF-8 text, plain or gzip"):
        read_documents(tmp_path / "a.gz")


def test_a_missing_text(tmp_path):
    with pytest.raises(EckartError, match=r"there is no text file .*nothing\.txt"):
        read_documents(tmp_path / "nothing.txt")


def test_documents_start_with_the_start_token(tokenizer, words):
    ids = encode_document(tokenizer, STORIES[0])
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1] != tokenizer.bos_token_id
    assert encode_document(words, "a b")[0] == words.cls_token_id
    assert encode_document(words, "a b") == [2, 5, 6, 3]


def test_windows_are_the_packed_documents_cut_evenly(tokenizer):
    found = windows(tokenizer, STORIES, samples=3, length=7, batch=2, held_out=2)
    ids = ids_of(tokenizer, STORIES)
    assert [tuple(batch.shape) for batch in found.batches] == [(2, 7), (1, 7)]
    assert torch.cat(found.batches).flatten().tolist() == ids[:21]
    assert torch.cat(found.held_out).flatten().tolist() == ids[21:35]
    assert found.disjoint
    assert found.tokens == 21


def test_by_default_most_windows_are_calibrated_on(tokenizer):
    document = " ".join(STORIES * 200)
    count = len(encode_document(tokenizer, document)) // 8
    found = windows(tokenizer, [document], samples=None, length=8, batch=50)
    assert sum(b.shape[0] for b in found.batches) == WINDOWS
    assert sum(b.shape[0] for b in found.held_out) == 16
    assert count > WINDOWS + 16
    short = windows(tokenizer, STORIES, samples=None, length=4, batch=50)
    full = len(ids_of(tokenizer, STORIES)) // 4
    assert sum(b.shape[0] for b in short.batches) == full - full // 8
    assert sum(b.shape[0] for b in short.held_out) == full // 8
    assert short.disjoint


def test_without_text_to_spare_the_calibration_windows_are_measured(tokenizer):
    full = len(ids_of(tokenizer, STORIES)) // 4
    found = windows(tokenizer, STORIES, samples=full, length=4, batch=50)
    assert not found.disjoint
    assert torch.equal(found.held_out[0], found.batches[0][:16])


def test_too_little_text_for_windows(tokenizer):
    count = len(ids_of(tokenizer, STORIES))
    full = count // 4
    with pytest.raises(
        EckartError, match=rf"has {count} tokens, but 99 samples of 4 need 396; use --samples {full} or"
    ):
        windows(tokenizer, STORIES, samples=99, length=4, batch=8)
    with pytest.raises(EckartError, match=r"1 samples of 400 need 400; give a longer text or a smaller --length"):
        windows(tokenizer, STORIES, samples=None, length=400, batch=8)


def test_sentences_are_lines_in_batches_of_equal_length(words):
    lines = ["a", "a b c", "b", "a b c d e", "", "c c c"]
    found = sentences(words, ["\n".join(lines[:3]), "\n".join(lines[3:])], samples=5, length=5, tokens_per_batch=8)
    assert sorted(sorted(batch.tolist()) for batch in found.batches) == [
        [[2, 5, 3], [2, 6, 3]],
        [[2, 5, 6, 7, 3]],
        [[2, 5, 6, 7, 8]],  # cut
        [[2, 7, 7, 7, 3]],
    ]
    assert not found.disjoint
    assert found.tokens == 21
    assert sorted(map(tuple, torch.cat([b[:, :1] for b in found.held_out]).tolist())) == [(2,)] * 5


def firsts(batches: list[torch.Tensor]) -> list[int]:
    return [row[1] for batch in batches for row in batch.tolist()]


def test_sentences_are_drawn_from_the_whole_text(words):
    sorted_text = "a\n" * 300 + "b\n" * 300 + "c\n" * 300
    found = sentences(words, [sorted_text], samples=90, length=8, tokens_per_batch=64, held_out=30)
    assert found.disjoint
    for batches, count in ((found.batches, 90), (found.held_out, 30)):
        drawn = Counter(firsts(batches))
        assert sum(drawn.values()) == count
        assert set(drawn) == {5, 6, 7}
        assert min(drawn.values()) >= count // 6


def test_no_sentence_is_drawn_twice(words):
    lines = ["a " * length for length in range(1, 41)]
    found = sentences(words, ["\n".join(lines)], samples=25, length=64, tokens_per_batch=64, held_out=10)
    lengths = [batch.shape[1] for batch in found.batches + found.held_out for _ in batch]
    assert len(lengths) == len(set(lengths)) == 35
    fewer = sentences(words, ["\n".join(lines)], samples=10, length=64, tokens_per_batch=64, held_out=0)
    assert {b.shape[1] for b in fewer.batches} < {b.shape[1] for b in found.batches}
    again = sentences(words, ["\n".join(lines)], samples=25, length=64, tokens_per_batch=64, held_out=10)
    assert [b.tolist() for b in again.batches + again.held_out] == [b.tolist() for b in found.batches + found.held_out]
    other = sentences(words, ["\n".join(lines)], samples=25, length=64, tokens_per_batch=64, held_out=10, seed=1)
    assert {b.shape[1] for b in other.batches} != {b.shape[1] for b in found.batches}


def test_how_many_sentences_are_drawn_by_default(words):
    by_default = sentences(words, ["a\n" * 5000], samples=None, length=8, tokens_per_batch=4096)
    assert sum(b.shape[0] for b in by_default.batches) == LINES
    assert sum(b.shape[0] for b in by_default.held_out) == 128


def test_as_many_lines_as_hold_the_tokens_asked_for(words):
    lines = ["a b c d"] * 6000

    def count(samples=None, tokens=0) -> int:
        found = sentences(words, ["\n".join(lines)], samples=samples, length=8, tokens_per_batch=64, tokens=tokens)
        assert sum(len(batch) for batch in found.held_out) == 128
        return sum(len(batch) for batch in found.batches)

    (each,) = {len(row) for row in sentences(words, lines[:1], samples=1, length=8, tokens_per_batch=8).batches[0]}
    assert count(tokens=each) == LINES
    assert count(tokens=each * 3000) == 3000
    assert count(tokens=each * 3000 - 1) == 3000
    assert count(tokens=10**9) == 6000 - 128
    assert count(samples=50, tokens=each * 3000) == 50


def test_too_few_sentences(words):
    with pytest.raises(EckartError, match=r"has 2 lines, but 3 samples are asked for; use --samples 2"):
        sentences(words, ["a\nb"], samples=3, length=8, tokens_per_batch=64)


def test_a_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        EckartError, match=r"has no usable tokenizer \(.*\); copy tokenizer\.json beside the weights"
    ) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_a_corrupt_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(EckartError, match="has no usable tokenizer"):
        load_tokenizer(tmp_path)
