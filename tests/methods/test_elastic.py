"""Elastic folders: every size is held, true to its promises, and the same however it is reached."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import eckart
from eckart.errors import EckartError
from eckart.files.elastic import ElasticLayer, coded_downs, fitted_for, read_order
from eckart.fit import metric, regress
from eckart.fit.refit import refit_down, refit_shared_up, shared_up
from eckart.maps import LowRank

KEEPS = (0.9, 0.83, 0.7, 0.66, 0.5)


@pytest.fixture(scope="module")
def elastic(tmp_path_factory, quick, demo) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECKART_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("elastic") / "model"
        outcome = eckart.compress(demo, folder, keep=0.9, elastic=True, **quick("eckart"))
    # its largest size went through the check that every folder goes through
    assert outcome.checked is not None
    assert outcome.checked.nbytes == outcome.plan.bytes_after == eckart.show(folder).made_by["bytes_after"]
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory, elastic) -> dict[float, Path]:
    parent = tmp_path_factory.mktemp("cut")
    return {keep: eckart.slice_folder(elastic, parent / str(keep), keep=keep) for keep in KEEPS}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(torch.arange(24)[None] % 90)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


def random_metric(generator: torch.Generator, m: int, n: int, outputs: torch.Tensor):
    x = torch.randn(5 * n, n, dtype=torch.float64, generator=generator)
    seen = x + 0.3 * torch.randn(5 * n, n, dtype=torch.float64, generator=generator)
    g, hat, both = ((a.mT @ b) / (5 * n) for a, b in ((x, x), (seen, seen), (x, seen)))
    return metric(g, shifted=hat, cross=both, outputs=outputs, input_shrinkage=0.01)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 1 << 16))
def test_the_first_components_are_the_fit_of_that_rank(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    root = torch.randn(m, 2 * m, dtype=torch.float64, generator=generator)
    found = regress(weight, random_metric(generator, m, n, root @ root.mT))
    whole = found.factors(min(m, n))
    for rank in range(1, min(m, n) + 1):
        first = LowRank(whole.up[:, :rank], whole.down[:rank])
        torch.testing.assert_close(first.dense(), found.factors(rank).dense())
        refitted = refit_down(weight, first.up, found.metric)
        torch.testing.assert_close(refitted, first.down, rtol=1e-6, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 1 << 16))
def test_refitted_down_factors_are_the_least_squares_solution_and_nested(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    root = torch.randn(m, 2 * m, dtype=torch.float64, generator=generator)
    one, other = (random_metric(generator, m, n, root @ root.mT) for _ in range(2))
    up = regress(weight, one).factors(max(1, min(m, n) - 1)).up
    down = refit_down(weight, up, other)
    # the normal equations, solved without knowing that the columns are orthogonal
    b = other.outputs
    expected = torch.linalg.solve(up.mT @ b @ up, up.mT @ b @ weight @ other.cross @ other.shifted.inverse())
    torch.testing.assert_close(down, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(refit_down(weight, up[:, :1], other), down[:1])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 9), st.integers(2, 9), st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 1 << 16)
)
def test_a_shared_up_factor_is_the_least_squares_solution(m, n, wanted, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    root = torch.randn(m, 2 * m, dtype=torch.float64, generator=generator)
    most = min(m, n)
    ranks = [min(most, rank) for rank in wanted] + [most]
    metrics = [random_metric(generator, m, n, root @ root.mT) for _ in ranks]
    b = metrics[0].outputs
    start = regress(weight, metrics[0]).factors(most).up

    def error(up, downs) -> float:
        out = 0.0
        for down, at, rank in zip(downs, metrics, ranks, strict=True):
            map_ = up[:, :rank] @ down
            products = weight @ at.inputs @ weight.mT + map_ @ at.shifted @ map_.mT - 2 * weight @ at.cross @ map_.mT
            out += float((b * products.mT).sum())
        return out

    downs = [refit_down(weight, start[:, :rank], at) for rank, at in zip(ranks, metrics, strict=True)]
    up = refit_shared_up(weight, start, downs, metrics)
    # the normal equations of all entries of U at once, with B, which cancels
    left, right = torch.zeros(most, most).double(), torch.zeros(m, most).double()
    for down, at in zip(downs, metrics, strict=True):
        whole = torch.cat([down, torch.zeros(most - len(down), n).double()])
        left, right = left + whole @ at.shifted @ whole.mT, right + weight @ at.cross @ whole.mT
    system = torch.kron(b, left)
    expected = torch.linalg.solve(system, (b @ right).flatten()).view(m, most)
    torch.testing.assert_close(up.mT @ b @ up, torch.eye(most).double(), rtol=1e-6, atol=1e-6)
    for rank in range(1, most + 1):  # the first columns span what those of the solution span
        inside = up[:, :rank] @ (up[:, :rank].mT @ b @ expected[:, :rank])
        torch.testing.assert_close(inside, expected[:, :rank], rtol=1e-5, atol=1e-5)
    errors = [error(*shared_up(weight, start, ranks, metrics, rounds=rounds)) for rounds in range(4)]
    assert all(after <= before + 1e-9 * errors[0] for before, after in pairwise(errors))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 1 << 16))
def test_down_factors_are_read_back_to_within_half_a_step(grown, n, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = [1 + sum(grown[: i + 1]) for i in range(len(grown))] + [0]  # dense at the largest size
    layer = ElasticLayer("l", "linear", (20, n), "block-0000", 0, None, True, False, tuple(ranks), 4)
    whole = torch.randn(max(ranks), n, dtype=torch.float64, generator=generator)
    noise = [0.1 * torch.randn(rank, n, dtype=torch.float64, generator=generator) for rank in ranks]
    downs = [whole[:rank] + each for rank, each in zip(ranks, noise, strict=True)]
    tensors, read = coded_downs(layer, downs, torch.float32)
    # one dense-sized tensor, and codes for every smaller size
    assert sum(t.is_floating_point() and t.ndim == 2 for t in tensors.values()) == 1
    assert all(len(t) == ranks[int(name.rpartition(".")[2])] for name, t in tensors.items() if name != "l.down")
    for i, (down, back) in enumerate(zip(downs, read, strict=True)):
        scale = tensors[f"l.scale.{i}"][:, None] if f"l.scale.{i}" in tensors else torch.zeros(len(down), 1)
        assert bool(((down - back).abs() <= 0.5001 * scale + 1e-6).all())


@pytest.mark.parametrize("keep", KEEPS)
def test_a_size_keeps_every_promise(keep, cut, elastic, demo):
    model = AutoModelForCausalLM.from_pretrained(cut[keep], dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(demo)
    total, numbers = (sum(p.numel() for p in each.parameters()) for each in (dense, model))
    assert keep - 0.01 <= numbers / total <= keep
    contents = eckart.show(cut[keep])
    assert contents.elastic is None
    assert all(layer.numbers <= layer.dense_numbers for layer in contents.layers)
    made_by, report = contents.made_by, json.loads((cut[keep] / "eckart.json").read_text())
    assert (made_by["parameters_after"], made_by["bytes_after"]) == (numbers, contents.nbytes)
    assert report["plan"]["kept"] == numbers / total
    assert report["measured"] is report["checked"] is None
    assert report.keys() == json.loads((elastic / "eckart.json").read_text()).keys()
    assert report["plan"].keys() == json.loads((elastic / "eckart.json").read_text())["plan"].keys()
    stated = {layer["name"]: layer["numbers"] for layer in report["plan"]["layers"]}
    assert all(stated[layer.name] == layer.numbers for layer in contents.layers)
    assert f"{numbers:,}" in (cut[keep] / "README.md").read_text()


@pytest.mark.parametrize("keep", KEEPS)
def test_loading_at_a_size_equals_loading_the_cut_folder(keep, cut, elastic, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(cut[keep])
    loaded = AutoModelForCausalLM.from_pretrained(elastic, keep=keep)
    assert torch.equal(logits(loaded), logits(expected))
    assert torch.equal(logits(eckart.load(elastic, keep=keep)), logits(expected))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(eckart.load(tmp_path / "saved")), logits(expected))
    assert eckart.show(tmp_path / "saved").elastic is None


def test_without_a_size_all_is_loaded(elastic, cut):
    whole = AutoModelForCausalLM.from_pretrained(elastic)
    assert torch.equal(logits(whole), logits(eckart.load(cut[0.9])))
    contents = eckart.show(elastic)
    assert (contents.elastic["least"], contents.elastic["largest"]) == (0.5, 0.9)


def test_cutting_is_deterministic_and_leaves_the_folder_alone(elastic, cut, tmp_path):
    before = {p: p.read_bytes() for p in elastic.rglob("*") if p.is_file()}
    again = eckart.slice_folder(elastic, tmp_path / "again", keep=0.7)
    assert {p: p.read_bytes() for p in elastic.rglob("*") if p.is_file()} == before
    assert all((cut[0.7] / p.name).read_bytes() == p.read_bytes() for p in again.iterdir())


def test_smaller_sizes_have_lower_ranks_and_more_loss(elastic):
    order = read_order(elastic)
    plans = [order.plan(keep) for keep in sorted(KEEPS)]
    losses = [sum(cut.loss for cut in plan.values()) for plan in plans]
    assert losses == sorted(losses, reverse=True)
    totals = [sum(cut.numbers for cut in plan.values()) for plan in plans]
    assert totals == sorted(totals)


def test_a_plan_says_every_size_beforehand(elastic, demo, quick, tmp_path):
    planned = eckart.plan(demo, keep=0.9, elastic=True, **quick("eckart"))
    made = json.loads((elastic / "eckart.json").read_text())["plan"]
    assert (planned.parameters_after, planned.bytes_after) == (made["parameters_after"], made["bytes_after"])
    assert {layer.name: layer.rank for layer in planned.layers} == {
        each["name"]: each["rank"] for each in made["layers"]
    }
    assert [at.keep for at in planned.sizes] == list(read_order(elastic).sizes)
    for at in planned.sizes[::4]:
        plan = json.loads(
            (eckart.slice_folder(elastic, tmp_path / str(at.keep), keep=at.keep) / "eckart.json").read_text()
        )
        assert (at.parameters, at.nbytes, at.loss) == tuple(
            plan["plan"][name] for name in ("parameters_after", "bytes_after", "loss")
        )
    held = [tensor for path in (elastic / "elastic").iterdir() for tensor in load_file(path).items()]
    assert planned.components == sum(t.nbytes for name, t in held if name not in ("steps", "losses"))
    assert planned.as_dict()["sizes"][0]["keep"] == 0.5
    assert "sizes" not in eckart.plan(demo, keep=0.9, **quick("svd")).as_dict()
    with pytest.raises(EckartError, match="svd-llm with these settings cannot be elastic"):
        eckart.plan(demo, keep=0.9, elastic=True, **quick("svd-llm"))


def test_biases_of_another_dtype_are_counted_as_they_are_stored(tmp_path, demo, quick):
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, attention_bias=True, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for block in model.model.layers:
        for layer in (block.self_attn.q_proj, block.self_attn.v_proj, block.self_attn.o_proj):
            layer.bias.data = torch.randn(32)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(demo).save_pretrained(tmp_path / "model")
    arguments = {"keep": 0.97, "elastic": True, **quick("eckart", storage="lowrank")}
    planned = eckart.plan(tmp_path / "model", **arguments)
    made = eckart.compress(tmp_path / "model", tmp_path / "out", **arguments)
    assert any(layer.structure == "dense" for layer in made.plan.layers if "self_attn" in layer.name)
    assert planned.sizes[-1].nbytes == planned.bytes_after == made.plan.bytes_after
    for at in planned.sizes[::5]:
        cut = eckart.slice_folder(tmp_path / "out", tmp_path / str(at.keep), keep=at.keep)
        held = sum(t.nbytes for path in cut.glob("*.safetensors") for t in load_file(path).values())
        assert at.nbytes == held == json.loads((cut / "eckart.json").read_text())["plan"]["bytes_after"]


def test_without_a_sequential_pass_cutting_is_compressing(tmp_path, demo, quick):
    arguments = quick("kfac", allocation="knapsack", storage="lowrank")
    eckart.compress(demo, tmp_path / "elastic", keep=0.9, elastic=True, **arguments)
    eckart.slice_folder(tmp_path / "elastic", tmp_path / "cut", keep=0.6)
    eckart.compress(demo, tmp_path / "direct", keep=0.6, **arguments)
    cut, direct = (eckart.show(tmp_path / name) for name in ("cut", "direct"))
    ranks = [{layer.name: layer.rank for layer in each.layers} for each in (cut, direct)]
    same = [name for name in ranks[0] if ranks[0][name] == ranks[1].get(name)]
    assert len(same) > 0.9 * len(ranks[0])  # the knapsack spends its last numbers between the corners of the hulls
    models = [eckart.load(tmp_path / name) for name in ("cut", "direct")]
    for name in same:
        matrices = [eckart.map_of(model.get_submodule(name)).dense() for model in models]
        torch.testing.assert_close(*matrices, rtol=1e-4, atol=1e-5)


SMALL = {"vocab_size": 512, "max_position_embeddings": 64}
ARCHITECTURES = {
    "untied": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    ),
    "conv1d": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "encoder": lambda: BertModel(
        BertConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("largest", [1.0, 0.8])
def test_heads_biases_and_encoders(architecture, largest, tmp_path, demo, quick):
    torch.manual_seed(0)
    ARCHITECTURES[architecture]().save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dense" / name).write_bytes((demo / name).read_bytes())
    eckart.compress(tmp_path / "dense", tmp_path / "e", keep=largest, elastic=True, least=0.6, **quick("eckart"))
    eckart.slice_folder(tmp_path / "e", tmp_path / "cut", keep=0.65)
    cls = AutoModel if architecture == "encoder" else AutoModelForCausalLM
    cut, loaded = cls.from_pretrained(tmp_path / "cut"), cls.from_pretrained(tmp_path / "e", keep=0.65)
    assert torch.equal(logits(cut), logits(loaded))
    dense = cls.from_pretrained(tmp_path / "dense")
    total, numbers = (sum(p.numel() for p in each.parameters()) for each in (dense, cut))
    assert 0.64 <= numbers / total <= 0.65
    eckart.densify(tmp_path / "cut", tmp_path / "densified")
    torch.testing.assert_close(logits(cls.from_pretrained(tmp_path / "densified")), logits(cut), rtol=1e-3, atol=1e-4)
    if largest == 1.0:  # nothing is lost
        assert torch.equal(logits(cls.from_pretrained(tmp_path / "e")), logits(dense))


def test_which_size_a_cut_between_two_takes_its_down_factors_from():
    keeps = (0.5, 0.6, 0.65, 0.651, 0.7, 0.85, 0.86, 0.9)
    assert [fitted_for((0.5, 0.7, 0.9), keep) for keep in keeps] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("keep", [0.49, 0.91, math.nan, "half", True])
def test_a_size_that_is_not_held(keep, elastic, tmp_path):
    with pytest.raises(EckartError, match=r"holds every size from keep 0\.5 to 0\.9, but"):
        eckart.slice_folder(elastic, tmp_path / "out", keep=keep)
    with pytest.raises(EckartError, match="holds every size from keep"):
        eckart.load(elastic, keep=keep)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_elastic(cut, demo, tmp_path):
    for folder in (cut[0.7], demo):
        with pytest.raises(EckartError, match="is not elastic, so it has one size only"):
            eckart.slice_folder(folder, tmp_path / "out", keep=0.6)
        with pytest.raises(EckartError, match="is not elastic"):
            eckart.load(folder, keep=0.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"least": 0.9}, "needs a least size between 0 and that"),
        ({"least": 0.0}, "needs a least size between 0 and that"),
        ({"keep": 1.2}, "must lie in"),
        ({"keep": None, "bytes": "1MB"}, "shares of the parameters; give keep, not bytes 1,000,000"),
        ({"keep": None, "flops": "0.6x"}, "shares of the parameters; give keep, not flops 0.6x"),
        ({"bytes": "1MB"}, "a run has one budget"),
        *(
            ({"method": method}, f"{method} with these settings cannot be elastic")
            for method in ("svd-llm", "basis-sharing", "modegpt", "slicegpt", "zs-svd", "eckart-mixed")
        ),
        ({"settings": {"bits": 4}}, "eckart with these settings cannot be elastic"),
        ({"method": "rtn", "keep": None}, "rtn with these settings cannot be elastic"),
        ({"method": "rtn"}, "keep must be 1"),
        ({"settings": {"bias": True}}, "eckart with these settings cannot be elastic"),
        ({"least": 0.001}, "cannot be met"),
    ],
)
def test_what_cannot_be_elastic(arguments, message, demo, quick, tmp_path):
    given = {**quick("eckart"), "keep": 0.8, **arguments}
    with pytest.raises(EckartError, match=message):
        eckart.compress(demo, tmp_path / "out", elastic=True, **given)
    assert not (tmp_path / "out").exists()


def test_damage_is_said(elastic, tmp_path):
    copy = tmp_path / "copy"
    for path in elastic.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(elastic)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(elastic)).write_bytes(path.read_bytes())
    part = copy / "elastic" / "block-0002.safetensors"
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(EckartError, match=r"block-0002.* is missing, damaged or incomplete"):
        eckart.slice_folder(copy, tmp_path / "out", keep=0.6)
    assert not (tmp_path / "out").exists()
    (copy / "elastic" / "order.safetensors").write_bytes(b"nothing")
    with pytest.raises(EckartError, match="is damaged"):
        eckart.slice_folder(copy, tmp_path / "out", keep=0.6)
