"""A fine-tune stored as a difference: what comes back, how many bytes that takes, and everything that can be wrong."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import eckart
from eckart.errors import EckartError, NumericalWarning
from eckart.files.delta import SPEC, TENSORS, matrix_shape
from eckart.files.text import encode_document
from eckart.fit import error_of
from eckart.methods.compress.job import Request
from eckart.methods.delta.choices import Fisher, Pair

SMALL = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 80},
    **{"vocab_size": 512, "max_position_embeddings": 64},
}
WEIGHTS = "model.safetensors"


def saved(folder: Path, demo: Path, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """A random Llama with the demonstration's tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SMALL, **settings})).to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    return folder


def changed(folder: Path, out: Path, change, seed: int = 1) -> Path:
    """A copy of a model with `change(name, tensor)` in place of its tensors."""
    shutil.copytree(folder, out)
    torch.manual_seed(seed)
    save_file(
        {n: change(n, t).contiguous() for n, t in load_file(folder / WEIGHTS).items()}, out / WEIGHTS, {"format": "pt"}
    )
    return out


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Every weight moved a little, mostly in few directions."""
    w = tensor.float()
    if w.ndim == 1:
        return (w + 0.01 * torch.randn_like(w)).to(tensor.dtype)
    few = torch.randn(w.shape[0], 4) @ torch.randn(4, w.shape[1])
    return (w + 0.01 * few + 0.004 * torch.randn_like(w)).to(tensor.dtype)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A base and a fine-tune of it, in float32."""
    folder = tmp_path_factory.mktemp("pair")
    base = saved(folder / "base", Path(eckart.__file__).parent / "demo/stories260k")
    tuned = changed(base, folder / "tuned", moved)
    (tuned / "generation_config.json").write_text('{"do_sample": true}\n')
    return base, tuned


@pytest.fixture(scope="module")
def stored(pair, tmp_path_factory) -> Path:
    """Their difference in a fifth of the bytes."""
    out = tmp_path_factory.mktemp("stored") / "delta"
    eckart.delta(*pair, out, keep=0.2)
    return out


@pytest.mark.parametrize(("keep", "bits"), [(0.1, None), (0.3, None), (0.2, 4), (0.3, 8), (0.5, 16), (1.0, None)])
def test_what_comes_back_is_near_and_within_the_budget(pair, tmp_path, keep, bits):
    base, tuned = pair
    made = eckart.delta(base, tuned, tmp_path / "delta", keep=keep, bits=bits)
    back = eckart.restore(base, tmp_path / "delta", tmp_path / "back")
    size = sum(len(data) for data in contents(tmp_path / "delta").values())
    before, after, first = (load_file(f / WEIGHTS) for f in (tuned, tmp_path / "back", base))
    assert size == made.nbytes <= keep * made.tuned_bytes
    assert made.tuned_bytes == sum(t.nbytes for t in before.values()) == back.nbytes
    assert back.exact
    left = 0.0
    for row in made.tensors:
        w, v, b = (t[row.name].double() for t in (before, after, first))
        if row.structure in ("exact", "same"):
            assert torch.equal(w, v)
        else:
            unit = max(float(w.square().sum()), float(b.square().sum()))
            assert row.after == pytest.approx(float((w - v).square().sum()) / unit, rel=1e-3, abs=1e-12)
            left += row.after
    assert made.after == pytest.approx(left)
    assert made.after < (0.05 if keep == 1 else 0.7) * made.before


def test_a_larger_budget_leaves_a_smaller_error(pair, tmp_path):
    left = [eckart.delta(*pair, tmp_path / str(keep), keep=keep).after for keep in (0.1, 0.2, 0.4)]
    assert left == sorted(left, reverse=True)


def test_a_budget_in_bytes(pair, tmp_path):
    made = eckart.delta(*pair, tmp_path / "delta", bytes="60KB")
    assert 50_000 < made.nbytes <= 60_000


def test_the_restored_folder_is_complete_and_loads(pair, stored, tmp_path):
    base, tuned = pair
    eckart.restore(base, stored, tmp_path / "back")
    assert contents(tmp_path / "back").keys() == contents(tuned).keys()
    for name in contents(tuned).keys() - {WEIGHTS}:
        assert (tmp_path / "back" / name).read_bytes() == (tuned / name).read_bytes(), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.generation_config.do_sample
    assert AutoTokenizer.from_pretrained(tmp_path / "back").encode("Once") == AutoTokenizer.from_pretrained(
        tuned
    ).encode("Once")
    # what the base has as well is not stored
    assert contents(stored).keys() == {SPEC, TENSORS, "generation_config.json"}


def test_restoring_and_storing_again_give_the_same_bytes(pair, stored, tmp_path):
    for name in ("first", "second"):
        assert eckart.restore(pair[0], stored, tmp_path / name).exact
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    eckart.delta(*pair, tmp_path / "again", keep=0.2)
    assert contents(tmp_path / "again") == contents(stored)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_low_rank_difference_is_found_at_its_rank(pair, tmp_path, rank):
    base = pair[0]

    def adapted(name: str, w: torch.Tensor) -> torch.Tensor:
        if "_proj" not in name:
            return w
        return w + 0.05 * torch.randn(w.shape[0], rank) @ torch.randn(rank, w.shape[1])

    tuned = changed(base, tmp_path / "tuned", adapted)
    made = eckart.delta(base, tuned, tmp_path / "delta", keep=1.0, bits=16)
    eckart.restore(base, tmp_path / "delta", tmp_path / "back")
    before, after, first = (load_file(f / WEIGHTS) for f in (tuned, tmp_path / "back", base))
    for row in made.tensors:
        assert row.structure == (f"lowrank {rank}x16 bit" if "_proj" in row.name else "same")
        difference = before[row.name] - first[row.name]
        assert float((after[row.name] - before[row.name]).norm()) <= 1e-3 * float(difference.norm())


def test_equal_models_store_nothing(pair, tmp_path):
    base = pair[0]
    made = eckart.delta(base, base, tmp_path / "delta", keep=0.2)
    assert {row.structure for row in made.tensors} == {"same"}
    assert load_file(tmp_path / "delta" / TENSORS) == {}
    eckart.restore(base, tmp_path / "delta", tmp_path / "back")
    assert load_file(tmp_path / "back" / WEIGHTS).keys() == load_file(base / WEIGHTS).keys()
    for name, tensor in load_file(base / WEIGHTS).items():
        assert torch.equal(tensor, load_file(tmp_path / "back" / WEIGHTS)[name])


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("second", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_kept(demo, tmp_path, first, second):
    base = saved(tmp_path / "base", demo, first)
    tuned = changed(base, tmp_path / "tuned", lambda n, t: moved(n, t).to(second) if "layers.0" in n else t.to(second))
    made = eckart.delta(base, tuned, tmp_path / "delta", keep=0.4)
    eckart.restore(base, tmp_path / "delta", tmp_path / "back")
    before, after = load_file(tuned / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert all(after[name].dtype == second and after[name].shape == t.shape for name, t in before.items())
    for row in made.tensors:
        assert (row.structure == "same") == ("layers.0" not in row.name)
    assert made.after < 0.3 * made.before


def test_tied_embeddings_stay_tied_and_untied_heads_start_from_them(demo, tmp_path):
    base = saved(tmp_path / "base", demo, tie_word_embeddings=True)
    tied = changed(base, tmp_path / "tied", moved)
    eckart.delta(base, tied, tmp_path / "d1", keep=0.3)
    eckart.restore(base, tmp_path / "d1", tmp_path / "r1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r1")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(moved("head", model.model.embed_tokens.weight.detach()))
    model.save_pretrained(tmp_path / "untied")
    made = eckart.delta(base, tmp_path / "untied", tmp_path / "d2", keep=0.3)
    change = json.loads((tmp_path / "d2" / SPEC).read_text())["tensors"]["lm_head.weight"]
    assert change["base"] == "model.embed_tokens.weight"
    assert made.after < 0.5 * made.before
    eckart.restore(base, tmp_path / "d2", tmp_path / "r2")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "r2").lm_head.weight.shape == (512, 48)


@pytest.mark.parametrize("size", [520, 500])
def test_tokens_added_to_the_vocabulary_are_stored_whole(pair, tmp_path, size):
    base = pair[0]
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(tmp_path / "tuned")
    eckart.delta(base, tmp_path / "tuned", tmp_path / "delta", keep=0.3)
    eckart.restore(base, tmp_path / "delta", tmp_path / "back")
    before, after = (load_file(f / WEIGHTS) for f in (tmp_path / "tuned", tmp_path / "back"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (size, 48)
        assert torch.equal(before[name][512:], after[name][512:])
        assert float((before[name] - after[name]).norm()) < 0.1 * float(before[name].norm())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == size


def test_layers_the_base_does_not_have_are_stored_whole(pair, demo, tmp_path):
    tuned = saved(tmp_path / "tuned", demo, num_hidden_layers=3)
    made = eckart.delta(pair[0], tuned, tmp_path / "delta", keep=0.6)
    third = {row.structure for row in made.tensors if "layers.2" in row.name}
    assert "exact" in third
    assert eckart.restore(pair[0], tmp_path / "delta", tmp_path / "back").tensors == len(load_file(tuned / WEIGHTS))
    with pytest.raises(EckartError, match=r"bytes cannot be met: what has to be stored whole takes .*layers\.2"):
        eckart.delta(pair[0], tuned, tmp_path / "tight", keep=0.01)
    assert not (tmp_path / "tight").exists()


def test_another_base_is_refused_before_anything_is_written(pair, stored, tmp_path):
    other = changed(pair[0], tmp_path / "other", lambda n, t: t + 1e-6 if n == "model.norm.weight" else t)
    with pytest.raises(EckartError, match=r"is a difference from base, whose weights have the hash .* give the base"):
        eckart.restore(other, stored, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def _truncate(folder: Path) -> None:
    os.truncate(folder / TENSORS, (folder / TENSORS).stat().st_size // 2)


def _flip(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(bytes(data))


def _edited(**values):
    def edit(folder: Path) -> None:
        spec = json.loads((folder / SPEC).read_text())
        (folder / SPEC).write_text(json.dumps({**spec, **values}))

    return edit


def _other_shape(folder: Path) -> None:
    spec = json.loads((folder / SPEC).read_text())
    name = next(n for n, change in spec["tensors"].items() if "map" in change)
    spec["tensors"][name]["base"] = "model.norm.weight"
    (folder / SPEC).write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is missing or damaged"),
        (_flip, "is missing or damaged"),
        (lambda f: (f / TENSORS).unlink(), "is missing or damaged"),
        (lambda f: (f / SPEC).unlink(), "give a folder that eckart delta wrote"),
        (lambda f: (f / SPEC).write_text('{"format": 1'), "is damaged"),
        (lambda f: (f / SPEC).write_text("[]"), "is damaged"),
        (lambda f: (f / "generation_config.json").unlink(), "has the generation_config.json that the tuned model had"),
        (_edited(format=2), "reads 1; update eckart"),
        (_edited(companions={"../../secret": "0"}), "a file name"),
        (_edited(tensors={"a": {"dtype": "float16", "base": "none"}}), "says of a cannot be"),
        (_edited(tensors={"a": {"dtype": "complex64"}}), "a dtype is none"),
        (_edited(tensors={"a": {"dtypo": "float16"}}), "is damaged"),
        (_other_shape, "cannot be"),
    ],
)
def test_damage_is_found_before_anything_is_written(pair, stored, tmp_path, damage, message):
    shutil.copytree(stored, tmp_path / "delta")
    damage(tmp_path / "delta")
    with pytest.raises(EckartError, match=message) as raised:
        eckart.restore(pair[0], tmp_path / "delta", tmp_path / "back")
    assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta"]


def test_arithmetic_that_differs_is_said(pair, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "delta")
    _edited(restored="0" * 64)(tmp_path / "delta")
    with pytest.warns(NumericalWarning, match="differs in rounding"):
        assert not eckart.restore(pair[0], tmp_path / "delta", tmp_path / "back").exact


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0.0}, r"must lie in \(0, 1\], got 0.0"),
        ({"keep": 1.5}, r"must lie in \(0, 1\], got 1.5"),
        ({"keep": math.nan}, r"must lie in \(0, 1\]"),
        ({"bytes": 0}, "bytes must be a size such as 20MB"),
        ({"bytes": 100}, "100 bytes cannot be met"),
        ({"keep": 0.1, "bytes": 100}, "not both"),
        ({"bits": 5}, "bits must be one of 4, 8, 16"),
        ({"calibration": "none.txt"}, "there is no text file none.txt"),
    ],
)
def test_impossible_requests_write_nothing(pair, tmp_path, given, message):
    with pytest.raises(EckartError, match=message):
        eckart.delta(*pair, tmp_path / "delta", **given)
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_are_said(pair, stored, tmp_path):
    base, tuned = pair
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    for run in (lambda out: eckart.delta(base, tuned, out), lambda out: eckart.restore(base, stored, out)):
        with pytest.raises(EckartError, match="already holds something"):
            run(tmp_path / "full")
        with pytest.raises(EckartError, match="cannot be written to"):
            run(tmp_path / "full/note/inside")
    with pytest.raises(EckartError, match="there is no model folder"):
        eckart.delta(tmp_path / "none", tuned, tmp_path / "out")
    broken = changed(tuned, tmp_path / "broken", lambda n, t: t.fill_(math.nan) if n == "model.norm.weight" else t)
    with pytest.raises(EckartError, match=r"model\.norm\.weight in .*broken holds 48 NaN or Inf values"):
        eckart.delta(base, broken, tmp_path / "out")
    eckart.compress(base, tmp_path / "small", method="svd", keep=0.7)
    with pytest.raises(EckartError, match="differences are of models with plain weights"):
        eckart.delta(base, tmp_path / "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((4, 6), (4, 6)), ((64, 64, 3, 3), (64, 576)), ((8, 128, 64), (1024, 64)), ((5, 1, 1), (5, 1))],
)
def test_tensors_of_more_axes_are_split_where_the_sides_are_alike(shape, matrix):
    assert matrix_shape(shape) == matrix


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory) -> tuple[Path, Path, Path]:
    """The demonstration model, a real fine-tune of it on other text, and that text."""
    demo, folder = Path(eckart.__file__).parent / "demo/stories260k", tmp_path_factory.mktemp("tuned")
    text = folder / "text.txt"
    text.write_text("\n".join(f"{i} plus {i % 7} makes {i + i % 7}." for i in range(160)))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32),
        AutoTokenizer.from_pretrained(demo),
    )
    ids = torch.tensor(encode_document(tokenizer, text.read_text())[: 64 * 40]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in (*ids.split(8), *ids.split(8)):
        logits = model(input_ids=batch[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return demo, folder / "model", text


@pytest.mark.slow
def test_a_text_makes_the_same_bytes_lose_less(fine_tuned, tmp_path):
    base, tuned, text = fine_tuned
    losses = {}
    for name, calibration in (("blind", None), ("seen", text)):
        given = {"calibration": calibration, "samples": 32 if calibration else None, "length": 64}
        made = eckart.delta(base, tuned, tmp_path / name, keep=0.03, **given)
        eckart.restore(base, tmp_path / name, tmp_path / f"{name}-back")
        losses[name] = eckart.evaluate(tmp_path / f"{name}-back", text=text, length=64).nats_per_token
        assert made.unit.startswith("nats" if calibration else "squared error")
    first, last = (eckart.evaluate(folder, text=text, length=64).nats_per_token for folder in (base, tuned))
    assert last < losses["seen"] < losses["blind"] < first


def test_weights_stored_transposed_are_measured_as_such(demo, text, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=512, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, tmp_path / "gpt2")
    fisher = Fisher(Request(tmp_path / "gpt2", "eckart", 1.0, text, 8, 32, 0, {}), True, tmp_path, lambda *_: None)
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"):
        stored = load_file(tmp_path / "gpt2" / WEIGHTS)[name]
        change = torch.randn_like(stored)
        mine = fisher.metric(Pair(name, name, None, tuple(stored.shape), torch.float32), stored)
        own = fisher.known.metric(fisher.layers[name], stored.mT)
        expected = error_of(change.mT, torch.zeros_like(change.mT), own) * fisher.known.scale()
        assert error_of(change, torch.zeros_like(change), mine) == pytest.approx(expected)
    tuned = changed(tmp_path / "gpt2", tmp_path / "tuned", moved)
    made = eckart.delta(tmp_path / "gpt2", tuned, tmp_path / "delta", keep=0.3, calibration=text, samples=8, length=32)
    assert made.after < 0.3 * made.before
    assert eckart.restore(tmp_path / "gpt2", tmp_path / "delta", tmp_path / "back").exact
