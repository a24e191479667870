"""Methods whose layers share: who shares, what is counted, what is stored, and that it is better where it says so."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import eckart
from eckart.errors import EckartError
from eckart.files.inspect import densify, show
from eckart.fit import Metric, error_of, regress
from eckart.hosts import map_of
from eckart.methods.compress.allocate import allocate
from eckart.methods.compress.groups import SharedPlan, fit_group, groups_of
from eckart.methods.compress.job import Request, open_job, statistics_store
from eckart.methods.compress.layers import Known, layers_of, weights
from eckart.methods.compress.sharing import Sharing
from eckart.progress import silent
from eckart.stats import collect_inputs

METHODS = {
    "basis-sharing": {},
    "concatenated-svd": {"threshold": 1.2},
    "cospadi": {"group": 2, "iterations": 1},
}
BERT = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
READERS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"}
WRITERS = {"self_attn.o_proj", "mlp.down_proj"}


def known_of(model, text, method: str, folder, keep: float = 0.7, **settings) -> Known:
    """The statistics of a few samples."""
    job = open_job(Request(model, method, keep, text, 8, 48, 0, settings), silent)
    known = Known(job, statistics_store(job, folder))
    collect_inputs(job.runner, job.calibration, known.store)
    return known


def names(known: Known, share: float = 0.5) -> list[list[str]]:
    """The groups of a method by their layers' names, without the prefix of all."""
    groups = groups_of(known.job, layers_of(known.job), known, share)
    return [[layer.name.removeprefix("model.layers.") for layer in group.members] for group in groups]


@pytest.fixture(scope="module")
def shared(tmp_path_factory, demo, text) -> dict:
    """The demonstration model at 0.6 by every method that shares."""
    parent = tmp_path_factory.mktemp("shared")
    options = {"calibration": text, "samples": 8, "length": 48, "keep": 0.6, "cache": False}
    return {
        method: eckart.compress(demo, parent / method, method=method, settings=settings, **options)
        for method, settings in METHODS.items()
    }


@pytest.mark.parametrize(("group", "expected"), [(2, [[0, 1], [2, 3]]), (3, [[0, 1, 2], [3, 4]]), (5, [[*range(5)]])])
def test_adjacent_readers_share_and_writers_stay_private(group, expected, demo, text, tmp_path):
    known = known_of(demo, text, "basis-sharing", tmp_path, group=group)
    found = names(known)
    assert {name.partition(".")[2] for members in found for name in members} == READERS
    for projection in READERS:
        mine = [members for members in found if members[0].endswith(projection)]
        assert mine == [[f"{i}.{projection}" for i in members] for members in expected]


def test_everything_shares_where_writers_do(demo, text, tmp_path):
    found = names(known_of(demo, text, "basis-sharing", tmp_path, writers=True))
    assert {name.partition(".")[2] for members in found for name in members} == READERS | WRITERS
    assert names(known_of(demo, text, "svd-llm", tmp_path)) == []


@pytest.mark.parametrize(
    ("make", "readers"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=512)),
            {"attn.c_attn", "mlp.c_fc"},
        ),
        (
            lambda: BertForMaskedLM(BertConfig(vocab_size=512, num_hidden_layers=2, **BERT)),
            {"attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"},
        ),
    ],
    ids=["gpt2", "bert"],
)
def test_writers_are_found_by_structure(make, readers, demo, text, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((demo / name).read_bytes())
    known = known_of(tmp_path / "model", text, "basis-sharing", tmp_path)
    prefixes = [f"{block}." for block in known.job.parts.blocks]
    members = [layer.name for g in groups_of(known.job, layers_of(known.job), known, 0.5) for layer in g.members]
    assert sorted(members) == sorted(prefix + reader for prefix in prefixes for reader in readers)


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_with_shared_numbers_counted_once(method, shared, demo):
    outcome = shared[method]
    plan, contents, tensors = outcome.plan, show(outcome.out), load_file(outcome.out / "model.safetensors")
    stored = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert 0.59 * plan.parameters_before <= plan.parameters_after <= 0.6 * plan.parameters_before
    assert stored == plan.parameters_after == contents.parameters
    assert sum(t.nbytes for t in tensors.values()) == plan.bytes_after == contents.nbytes
    assert {layer.name: layer.numbers for layer in contents.layers} == {
        layer.name: layer.numbers for layer in plan.layers if layer.structure != "dense"
    }
    stated = json.loads((outcome.out / "eckart.json").read_text())["plan"]
    assert stated["parameters_after"] == stored
    assert "| shared " in (outcome.out / "README.md").read_text()
    # what a plan says beforehand is what comes out
    settings = {"settings": METHODS[method], "samples": 8, "length": 48, "keep": 0.6, "cache": False}
    before = eckart.plan(demo, method=method, calibration=demo.parent / "train.txt", **settings)
    assert before.parameters_after == plan.parameters_after
    assert [(a.name, a.structure, a.rank, a.numbers) for a in before.layers] == [
        (b.name, b.structure, b.rank, b.numbers) for b in plan.layers
    ]
    assert all(layer.loss > 0 for layer in before.layers if layer.structure != "dense")


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_a_group_hold_one_tensor(method, shared, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(shared[method].out, dtype=torch.float32).eval()
    entries = model.config.quantization_config.layers
    taken = [(name, key, owner) for name, entry in entries.items() for key, owner in entry.get("shared", {}).items()]
    assert taken
    for name, key, owner in taken:
        assert model.get_parameter(f"{name}.{key}") is model.get_parameter(f"{owner}.{key}")
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.save_pretrained(tmp_path / "again")
        densify(shared[method].out, tmp_path / "dense")
        for folder, exact in (("again", True), ("dense", False)):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()
            torch.testing.assert_close(again(ids).logits, before, atol=0 if exact else 2e-4, rtol=0 if exact else 1e-4)


def test_basis_sharing_is_the_svd_of_the_whitened_stack(demo, text, tmp_path):
    known = known_of(demo, text, "basis-sharing", tmp_path)
    group = groups_of(known.job, layers_of(known.job), known, 0.5)[0]
    found = allocate(known.job, layers_of(known.job), known, predict=False, progress=silent)
    plan = next(plan for plan in found.shared if plan.group.name == group.name)
    parts = list(weights(known.job, list(group.members)))
    root = torch.linalg.cholesky(sum(known.data(layer, w).inputs.second.double() for layer, w in parts))
    u, s, v = torch.linalg.svd(torch.cat([w.double() for _, w in parts]) @ root, full_matrices=False)
    k = plan.option.rank
    basis = torch.linalg.solve_triangular(root, v[:k], upper=False, left=False)
    expected = (u[:, :k] * s[:k]) @ basis
    got = torch.cat([fit.map.dense() for fit in fit_group(known.job, known, plan)])
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_rounds_lower_the_error_of_every_projection(demo, text, tmp_path):
    known = known_of(demo, text, "basis-sharing", tmp_path, writers=True)
    eased = known_of(demo, text, "basis-sharing", tmp_path, writers=True, rounds=3)
    plans = allocate(known.job, layers_of(known.job), known, predict=False, progress=silent).shared
    for plan in plans:
        common, own = (sum(fit.relative for fit in fit_group(k.job, k, plan)) for k in (known, eased))
        assert own < common, plan.group.name


@pytest.mark.parametrize("algorithm", ["residual", "incremental"])
def test_clusters_keep_what_their_threshold_promises(algorithm, demo, text, tmp_path):
    known = known_of(demo, text, "concatenated-svd", tmp_path, algorithm=algorithm, threshold=1.05, rounds=0)
    share = 0.5
    groups = groups_of(known.job, layers_of(known.job), known, share)
    assert groups
    for group in groups:
        projection, n = group.name.partition("layers.0.")[2] or group.name.split(".", 3)[3], group.shape[1]
        alike = [layer for layer in layers_of(known.job) if layer.name.endswith(projection)]
        moment = sum(known.data(layer, w).inputs.second.double() for layer, w in weights(known.job, alike))
        parts = [w.double() for _, w in weights(known.job, list(group.members))]
        parts = [w / error_of(w, torch.zeros_like(w), Metric(moment)) ** 0.5 for w in parts]
        joint, alone = (int(share * m * n / (m + n)) for m in (group.shape[0], parts[0].shape[0]))
        separate = sum(float(regress(w, Metric(moment)).errors()[alone]) for w in parts)
        assert float(regress(torch.cat(parts), Metric(moment)).errors()[joint]) <= 1.05 * separate * (1 + 1e-9)


def test_a_lower_threshold_shares_less(demo, text, tmp_path):
    shared = []
    for threshold in (0.5, 1.0, 2.0):
        known = known_of(demo, text, "concatenated-svd", tmp_path, threshold=threshold)
        shared.append(sum(len(group.members) for group in groups_of(known.job, layers_of(known.job), known, 0.5)))
    assert shared[0] < shared[1] < shared[2]


def test_the_knapsack_takes_a_group_as_one_layer(demo, text, tmp_path):
    options = {"calibration": text, "samples": 8, "length": 48, "keep": 0.7, "cache": False}
    settings = {"allocation": "knapsack", "storage": "pivoted", "round_to": 4}
    outcome = eckart.compress(demo, tmp_path / "out", method="basis-sharing", settings=settings, **options)
    assert 0.69 <= outcome.plan.kept <= 0.7
    ranks: dict[str, set[int]] = {}
    for layer in outcome.plan.layers:
        if layer.structure == "shared lowrank":
            index, projection = layer.name.split(".", 3)[2:]
            ranks.setdefault(f"{int(index) // 2} {projection}", set()).add(layer.rank)
        assert layer.structure in ("dense", "pivoted", "shared lowrank")
    assert all(len(of_group) == 1 for of_group in ranks.values())
    assert len({rank for of_group in ranks.values() for rank in of_group}) > 2
    assert show(outcome.out).parameters == outcome.plan.parameters_after


def test_healing_leaves_what_is_shared_as_it_was(demo, text, tmp_path):
    options = {"calibration": text, "samples": 8, "length": 48, "keep": 0.6, "method": "basis-sharing"}
    plain = eckart.compress(demo, tmp_path / "plain", **options)
    healed = eckart.compress(demo, tmp_path / "healed", settings={"heal": 5, "heal_rate": 1e-3}, **options)
    assert healed.measured.after < plain.measured.after
    before, after = (load_file(outcome.out / "model.safetensors") for outcome in (plain, healed))
    entries = json.loads((plain.out / "config.json").read_text())["quantization_config"]["layers"]
    bases = {f"{owner}.{key}" for entry in entries.values() for key, owner in entry.get("shared", {}).items()}
    assert bases
    for name in before:
        if name in bases:
            assert torch.equal(before[name], after[name])
        elif name.endswith("q_proj.up.weight"):
            assert not torch.equal(before[name], after[name])


def test_ranks_grow_with_the_layers_that_share(shared, demo):
    alone = eckart.plan(demo, method="svd", keep=0.6)
    ranks = {layer.name: layer.rank for layer in alone.layers}
    for layer in shared["basis-sharing"].plan.layers:
        if layer.structure == "shared lowrank":
            assert layer.rank > ranks[layer.name]


def test_groups_of_one_are_left_alone(demo, text, tmp_path):
    outcome = eckart.compress(
        demo, tmp_path / "out", method="concatenated-svd", keep=0.7, calibration=text, samples=4, length=32,
        settings={"threshold": 1e-6},
    )  # fmt: skip
    assert {layer.structure for layer in outcome.plan.layers} == {"lowrank"}
    entries = json.loads((outcome.out / "config.json").read_text())["quantization_config"]["layers"]
    assert not any("shared" in entry for entry in entries.values())


def test_what_a_group_stores_does_not_depend_on_when_it_is_fitted(shared, demo, text, tmp_path):
    again = eckart.compress(
        demo, tmp_path / "again", method="basis-sharing", keep=0.6, calibration=text, samples=8, length=48, cache=False
    )
    for name in ("model.safetensors", "config.json", "eckart.json", "README.md"):
        assert (again.out / name).read_bytes() == (shared["basis-sharing"].out / name).read_bytes(), name


@pytest.mark.parametrize(("size", "algorithm"), list(itertools.product([None], [None])) + [(2, "union")])
def test_groups_are_adjacent_or_clustered(size, algorithm):
    with pytest.raises(EckartError, match="in adjacent groups of a size, or in clusters by an algorithm"):
        Sharing(size=size, algorithm=algorithm)


def test_members_hold_equal_factors_before_they_are_stored(demo, text, tmp_path):
    known = known_of(demo, text, "cospadi", tmp_path, group=2, iterations=1)
    for plan in allocate(known.job, layers_of(known.job), known, predict=False, progress=silent).shared[:2]:
        fits = fit_group(known.job, known, SharedPlan(plan.group, plan.option))
        assert all(fit.map.maps[1].weight is fits[0].map.maps[1].weight for fit in fits)
        assert all(map_of(eckart.host(fit.map)) == fit.map for fit in fits)
