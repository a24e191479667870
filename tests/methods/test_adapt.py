"""Adapters through their door: what each method promises, and what the handle does with them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import eckart
from eckart.errors import EckartError
from eckart.fit.quantize import Coding, quantize
from eckart.hosts import AdaptedHost, Adapter, host, map_of
from eckart.hosts.adapter import Plus, Rescaled, Times
from eckart.hosts.factored import factored_rescale
from eckart.linalg import svd_of_product
from eckart.maps import Bitmap, Cayley, Dense, LowRank, Quantized, RowNormalized, bitmap, row_norms
from eckart.methods.adapt.lora_pro import closest_to_full

SETTINGS = {
    "oft": {"block": 8}, "svfit": {"rank": 5}, "soka": {"rank": 2, "block": 8},
    "sara": {"threshold": 5e-3}, "lift": {"rank": 4, "budget": 4}, "s2ft": {"channels": 4},
    "flylora": {"rank": 8, "kept": 4}, "ia3": {},
}  # fmt: skip
MERGING = [method for method in eckart.ADAPTERS if method != "flylora"]
MOVES = {"lora-xs": 1e-3, "lora-sb": 1.0, "snella": 1e-2}  # methods that do not start at the base, and how far from it
IDS = torch.arange(24).reshape(2, 12) % 31


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=31, max_position_embeddings=32, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=31, n_positions=32)).eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def settings(method: str) -> dict[str, int]:
    return SETTINGS.get(method, {"rank": 4})


def adapted(method: str, model: nn.Module | None = None, **options: object) -> nn.Module:
    model = model or llama()
    return eckart.adapt(model, method, data=[IDS, IDS + 3], **settings(method), **options).eval()


def train(model: nn.Module, steps: int = 6) -> list[float]:
    handle = eckart.adapters(model)
    optimizer = torch.optim.AdamW(handle.parameter_groups(weight_decay=0.0))
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        (loss + handle.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def disturb(model: nn.Module, name: str = "default") -> None:
    """Move an adapter away from its start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in eckart.adapters(model).layers.values():
            for parameter in layer.adapter(name).trained():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", MERGING)
def test_a_method_starts_at_the_base_learns_merges_and_leaves_no_trace(method: str, make):
    model = make()
    before, bytes_before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    adapted(method, model)
    handle = eckart.adapters(model)
    assert (logits(model) - before).abs().max() < MOVES.get(method, 1e-5)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(bytes_before[k.replace(".base", "")], v)
        for k, v in model.state_dict().items()
        if ".adapters." not in k
    )
    disturb(model)
    moved = logits(model)
    assert (moved - before).abs().max() > 1e-3
    lost = handle.merge()
    assert lost.keys() == handle.layers.keys()
    assert max(lost.values()) < 1e-4
    assert torch.allclose(logits(model), moved, atol=1e-4)
    handle.unmerge()
    assert torch.equal(logits(model), moved)
    with handle.off():
        assert torch.equal(logits(model), before)
    handle.remove()
    assert model.state_dict().keys() == bytes_before.keys()
    assert all(torch.equal(bytes_before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


FORMULAS = {
    "lora": lambda m, n: 4 * (m + n),
    "rslora": lambda m, n: 4 * (m + n),
    "lora+": lambda m, n: 4 * (m + n),
    "dora": lambda m, n: 4 * (m + n) + m,
    "pissa": lambda m, n: 4 * (m + n),
    "olora": lambda m, n: 4 * (m + n),
    "corda": lambda m, n: 4 * (m + n),
    "lora-xs": lambda m, n: 16,
    "lora-sb": lambda m, n: 16,
    "lora-pro": lambda m, n: 4 * (m + n),
    "allora": lambda m, n: 4 * (m + n),
    "svfit": lambda m, n: 5,
    "sorsa": lambda m, n: 4 * (m + n + 1),
    "soka": lambda m, n: 2 * (64 + (m // 8) * (n // 8)),
    "miss": lambda m, n: 4 * m,
    "hra": lambda m, n: 4 * n,
    "oft": lambda m, n: n * 7 // 2,
    "sparselora": lambda m, n: 4 * (m + n),
    "vera": lambda m, n: m + 4,
    "ia3": max,
    "loha": lambda m, n: 8 * (m + n),
    "lokr": lambda m, n: {16: 4, 32: 4, 48: 6}[m] * {32: 4, 48: 6}[n] + {16: 4, 32: 8, 48: 8}[m] * 8,
    "hira": lambda m, n: 4 * (m + n),
    "ffa-lora": lambda m, n: 4 * m,
    "fedsvd": lambda m, n: 4 * m,
    "incremental": lambda m, n: 4 * (m + n) + 4,
}


@pytest.mark.parametrize("method", FORMULAS)
def test_trained_numbers_are_the_paper_s(method: str):
    model = adapted(method)
    for layer in eckart.adapters(model).layers.values():
        m, n = layer.out_features, layer.in_features
        assert sum(p.numel() for p in layer.adapter("default").trained()) == FORMULAS[method](m, n)


@pytest.mark.parametrize("method", eckart.ADAPTERS)
def test_every_sequence_gets_the_adapter_it_asks_for(method: str):
    model = adapted(method)
    adapted(method, model, name="other", seed=5)
    disturb(model)
    handle = eckart.adapters(model)
    ids, alone = torch.cat([IDS, IDS[:1]]), {}
    for name in ("default", "other"):
        handle.use(name)
        alone[name] = logits(model, ids)
    handle.use()
    wanted = torch.stack([alone["other"][0], logits(model, ids)[1], alone["default"][2]])
    with handle.requests(["other", None, "default"]):
        assert torch.allclose(logits(model, ids), wanted, atol=1e-6)
        with pytest.raises(EckartError, match="3 requests were named for a batch of 2"):
            logits(model)


# Rows of a map that is rescaled already have no rule.
@pytest.mark.filterwarnings("ignore::eckart.errors.CostWarning")
@pytest.mark.parametrize("first", ["lora", "dora", "hra", "miss"])
@pytest.mark.parametrize("second", ["dora", "oft", "pissa"])
def test_two_adapters_on_one_layer_compose_and_merge(first: str, second: str):
    model = adapted(first)
    adapted(second, model, name="second")
    disturb(model)
    disturb(model, "second")
    handle = eckart.adapters(model)
    handle.use("default", "second")
    layer = next(iter(handle.layers.values()))
    x = torch.randn(5, layer.in_features)
    base = layer.base.weight.double()
    inner = layer.adapter("default").of(Dense(base)).to(torch.float64)
    expected = layer.adapter("second").of(inner).to(torch.float64).dense()
    got = layer(x) - layer.offset if layer.offset is not None else layer(x)
    assert torch.allclose(got.double(), x.double() @ expected.mT, atol=1e-5)
    moved = logits(model)
    handle.merge()
    assert torch.allclose(logits(model), moved, atol=1e-4)


def test_weights_interpolate_between_base_and_adapted():
    for method in ("lora", "dora", "oft"):
        model = adapted(method)
        disturb(model)
        handle = eckart.adapters(model)
        layer = next(iter(handle.layers.values()))
        x = torch.randn(3, layer.in_features)
        whole, base = layer(x), layer.base(x)
        handle.use(default=0.25)
        assert torch.allclose(layer(x), base + 0.25 * (whole - base), atol=1e-5)
        handle.merge()
        assert torch.allclose(layer(x), base + 0.25 * (whole - base), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (3, 6), (1, 1)])
def test_the_factored_function_is_dora_by_autograd(shape: tuple[int, int], bias: bool):
    torch.manual_seed(0)
    (m, n), r = shape, min(shape)
    base = nn.Linear(n, m, bias=bias).double().requires_grad_(False)
    pair = LowRank(torch.randn(m, r).double(), torch.randn(r, n).double())
    magnitude = torch.rand(m).double() + 0.5
    magnitude[0] = 0.0
    adapter = Adapter([Plus(pair, 0.7), Rescaled(magnitude)])
    x = torch.randn(2, 4, n, dtype=torch.float64, requires_grad=True)
    got = factored_rescale(x, base, adapter)
    assert got is not None
    with torch.no_grad():
        norms = row_norms(Dense(base.weight + 0.7 * pair.dense()))
    up, down, g = adapter.chain()[0].delta.up.weight, adapter.chain()[0].delta.down.weight, adapter.chain()[1].magnitude
    plain = (g / norms) * (x @ base.weight.mT + 0.7 * x @ down.mT @ up.mT)
    plain = plain if base.bias is None else plain + base.bias
    assert torch.allclose(got, plain, atol=1e-12)
    seed = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (x, up, down, g), seed),
        torch.autograd.grad(plain, (x, up, down, g), seed),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-10)


def test_dora_on_a_rotation_and_sparse_entries_is_one_expression():
    torch.manual_seed(0)
    base = nn.Linear(8, 6)
    layer = AdaptedHost(base)
    sparse = bitmap(torch.randn(6, 8), 2)
    adapter = Adapter([Times(Cayley(torch.randn(2, 6), 4)), Plus(sparse, 0.5), Rescaled(torch.rand(6))])
    layer.add("all", adapter)
    layer.active = {"all": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(layer.held_map(), RowNormalized)
        x = torch.randn(5, 8)
        assert torch.allclose(layer(x), x @ layer.held_map().dense().mT + base.bias, atol=1e-5)


def test_low_rank_base_stays_low_rank_and_says_what_is_lost():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": host(LowRank(torch.randn(16, 4), torch.randn(4, 20)), torch.randn(16))})
    eckart.adapt(model, "lora", targets=["layer"], rank=2)
    disturb(model)
    handle, layer = eckart.adapters(model), eckart.adapters(model).layers["layer"]
    full = layer.held_map().dense()
    lost = handle.merge()["layer"]
    merged = map_of(layer._merged[0])
    assert isinstance(merged, LowRank)
    assert merged.rank == 4
    best = (torch.linalg.svdvals(full)[4:].norm() / (full - map_of(layer.base).dense()).norm()).detach()
    assert lost == pytest.approx(float(best), rel=1e-3)


def test_sparse_and_quantized_bases_keep_their_structure():
    torch.manual_seed(0)
    weight = torch.randn(12, 16)
    for base, kind in ((bitmap(weight, 8), Bitmap), (codes_of(weight), Quantized)):
        model = nn.ModuleDict({"layer": host(base)})
        eckart.adapt(model, "lora", targets=["layer"], rank=2)
        disturb(model)
        layer = eckart.adapters(model).layers["layer"]
        wanted = layer.held_map().dense()
        lost = eckart.adapters(model).merge()["layer"]
        merged = map_of(layer._merged[0])
        assert isinstance(merged, kind)
        assert 0 < lost < 1 or kind is Quantized
        if kind is Bitmap:
            assert torch.allclose(merged.dense(), wanted * (base.dense() != 0), atol=1e-5)
        else:
            assert (merged.dense() - wanted).abs().max() < 0.6


def codes_of(weight: Tensor) -> Quantized:
    return quantize(weight, Coding(4, group_size=16))


def test_lora_pro_s_gradients_are_the_nearest_to_the_full_one():
    torch.manual_seed(0)
    b, a, g = (torch.randn(*s, dtype=torch.float64) for s in ((9, 3), (3, 7), (9, 7)))
    scale = 0.5
    of_b, of_a = closest_to_full(b, a, scale * g @ a.mT, scale * b.mT @ g, scale)
    got = scale * (b @ of_a + of_b @ a)
    design = torch.cat((torch.kron(b, torch.eye(7)), torch.kron(torch.eye(9), a.mT.contiguous())), 1) * scale
    best = design @ torch.linalg.lstsq(design, g.reshape(-1), driver="gelsd").solution
    assert torch.allclose(got.reshape(-1), best, atol=1e-6)


def test_gradient_rules_hold_under_accumulation_and_any_optimizer():
    model = adapted("lora-pro")
    disturb(model)
    whole = gradients(model, [IDS])
    parts = gradients(model, [IDS[:1], IDS[1:]])
    assert all(torch.allclose(whole[name], parts[name] / 2, atol=1e-6) for name in whole)
    plain = copy.deepcopy(model)
    for layer in eckart.adapters(plain).layers.values():
        layer.adapter("default").rule(None)
    assert not all(torch.allclose(whole[name], other) for name, other in gradients(plain, [IDS]).items())


def gradients(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        model(batch, labels=batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_eva_spends_the_same_sum_of_ranks_where_inputs_vary():
    model = adapted("eva")
    ranks = [
        layer.adapter("default").chain()[0].delta.up.weight.shape[1] for layer in eckart.adapters(model).layers.values()
    ]
    assert sum(ranks) == 4 * len(ranks)
    assert max(ranks) <= 8
    assert len(set(ranks)) > 1


def test_lora_plus_hands_its_rates_to_the_optimizer():
    groups = eckart.adapters(adapted("lora+")).parameter_groups(1e-3, weight_decay=0.1)
    assert sorted(group["lr"] for group in groups) == pytest.approx([1e-3, 2e-2])
    assert all(group["weight_decay"] == 0.1 for group in groups)


def test_heads_train_whole_beside_the_adapter():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=31, num_labels=3
    )
    model = eckart.adapt(BertForSequenceClassification(config), "lora", rank=2)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= names
    assert all(".adapters.default." in name or name.startswith("classifier.") for name in names)
    before = model.classifier.weight.clone()
    with torch.no_grad():
        model.classifier.weight += 1
    eckart.adapters(model).remove()
    assert torch.equal(model.classifier.weight, before)


def test_a_merge_that_is_refused_leaves_every_layer_as_it_was():
    model = adapted("lora", targets=["q_proj"])
    adapted("flylora", model, name="routed", targets=["up_proj"])
    handle = eckart.adapters(model)
    handle.use("default", "routed")
    for merge in (handle.merge, handle.fold):
        with pytest.raises(EckartError):
            merge()
        assert not any(layer.is_merged for layer in handle.layers.values())
        assert all(isinstance(model.get_submodule(name), AdaptedHost) for name in handle.layers)


def test_same_seed_same_bits_whatever_other_layers_there_are():
    a = adapted("lora", targets=["q_proj"])
    b = adapted("lora", targets=["q_proj", "up_proj"])
    wanted = {n: p for n, p in a.named_parameters() if "down" in n and "adapters" in n}
    assert wanted
    assert all(torch.equal(p, b.get_parameter(n)) for n, p in wanted.items())
    other = adapted("lora", targets=["q_proj"], seed=1)
    assert not any(torch.equal(p, other.get_parameter(n)) for n, p in wanted.items())


def test_low_rank_adapters_train_under_autocast():
    for method in ("lora", "pissa"):
        model = adapted(method)
        disturb(model)
        plain = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(IDS, labels=IDS)
            got.loss.backward()
        assert (got.logits.float() - plain).abs().max() < 0.1 * plain.abs().max()


def test_half_precision_bases_keep_their_dtype_and_adapters_float32():
    for method in ("lora", "dora", "oft", "miss"):
        model = adapted(method, llama().bfloat16())
        train(model, 2)
        assert logits(model).dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "lorra"}, "unknown method 'lorra'; did you mean 'lora'"),
        ({"rnk": 4}, "lora has no setting 'rnk'; did you mean 'rank'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 99}, "rank 99 is more than"),
        ({"rank": 2.5}, "the setting rank of lora must be a whole number, got 2.5"),
        ({"targets": ["qq_proj"]}, "targets name 'qq_proj', which no linear layer is called"),
        ({"trained": ["heads"]}, "no module is called 'heads'"),
        ({"targets": "("}, r"targets '\(' is no regular expression"),
        ({"targets": 3}, "targets must be a list of names or a regular expression, got 3"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"method": "miss", "rank": 4, "dropout": -0.5}, "dropout must be at least 0 and less than 1, got -0.5"),
        ({"seed": 1 << 32}, "seed must be a whole number from 0 to 4294967295, got 4294967296"),
        ({"seed": "a"}, "seed must be a whole number from 0 to 4294967295, got 'a'"),
        ({"method": "corda", "data": {"input_ids": torch.ones(1, 4)}}, "data= takes a list of batches"),
        ({"method": "ties"}, "ties combines adapters that are there"),
        ({"name": 3}, "must have at least one letter and no dot, got 3"),
        ({"name": "a.b"}, "must have at least one letter and no dot"),
        ({"method": "corda"}, "give data="),
        ({"method": "hra", "rank": 3}, "rank must be even for hra"),
        ({"method": "oft", "block": 7}, "blocks of 7 do not divide the 32 inputs"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(options: dict[str, object], sentence: str):
    model = llama()
    before = [type(m) for m in model.modules()]
    with pytest.raises(EckartError, match=sentence):
        eckart.adapt(model, **options)
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(EckartError, match="has no adapters"):
        eckart.adapters(model)


def test_a_second_adapter_of_the_same_name_is_refused():
    model = adapted("lora")
    with pytest.raises(EckartError, match="there is an adapter called 'default' already"):
        adapted("dora", model)
    with pytest.raises(EckartError, match="no adapter is called 'defualt'; did you mean 'default'"):
        eckart.adapters(model).use("defualt")


def test_what_is_adapted_is_a_loaded_model():
    with pytest.raises(EckartError, match=r"adapt takes a loaded model, got 'folder'; eckart\.tune takes a folder"):
        eckart.adapt("folder", "lora")


def test_layers_outside_of_blocks_have_to_be_named():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    with pytest.raises(EckartError, match=r"has no list of equal blocks .*; name the layers to adapt in targets"):
        eckart.adapt(model, "lora", rank=2)
    assert eckart.adapters(eckart.adapt(model, "lora", rank=2, targets=["2"])).count() == 2 * (32 + 32)
    with pytest.raises(EckartError, match="ReLU has no linear layer or convolution wide enough to be adapted"):
        eckart.adapt(nn.ReLU(), "lora", targets=["0"])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "half", None])
def test_a_weight_that_is_no_number_is_refused_and_changes_nothing(weight: Any):
    model = adapted("lora")
    disturb(model)
    before = logits(model)
    with pytest.raises(EckartError, match="the weight of default must be a finite number"):
        eckart.adapters(model).use(default=weight)
    assert torch.equal(logits(model), before)


def test_one_name_of_a_module_that_trains_will_do():
    model = eckart.adapt(llama(), "lora", rank=2, trained="lm_head")
    assert model.lm_head.weight.requires_grad


def test_folding_leaves_a_plain_model():
    model = adapted("dora")
    disturb(model)
    moved = logits(model)
    assert eckart.adapters(model).fold() is model
    assert not any(isinstance(m, AdaptedHost) for m in model.modules())
    assert torch.allclose(logits(model), moved, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())


def test_compiled_and_copied_models_agree():
    for method in ("lora", "dora", "hra"):
        model = adapted(method)
        disturb(model)
        expected = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), expected)
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(logits(compiled), expected, atol=1e-6)


def test_sums_of_factors_are_recombined_exactly():
    torch.manual_seed(0)
    pairs = [(torch.randn(20, 3), torch.randn(3, 12)), (torch.randn(20, 2), torch.randn(2, 12))]
    dense = sum(u @ v for u, v in pairs)
    found = svd_of_product(pairs, 4)
    values = torch.linalg.svdvals(dense)
    assert torch.allclose(found.values, values[:4], rtol=1e-5)
    assert float(found.errors[4]) == pytest.approx(float(values[4:].square().sum()), rel=1e-4)
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    assert torch.allclose(found.dense(), (left[:, :4] * values[:4]) @ right[:4], atol=1e-4)


def test_the_trainer_of_transformers_trains_what_is_adapted(tmp_path: Path):
    model = adapted("dora")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=1, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    Trainer(model=model, args=options, train_dataset=rows).train()
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in frozen.items())
    assert not any(torch.equal(p, model.get_parameter(name)) for name, p in trained.items() if "down" not in name)


def test_checkpointed_blocks_have_the_same_gradients():
    for method in ("lora", "dora", "hra", "lora-pro"):
        model = adapted(method)
        disturb(model)
        plain = gradients(model, [IDS])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        checkpointed = gradients(model, [IDS])
        assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)
