"""Methods that train the whole model: what each paper says of its layer, and what they do to a model."""

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

import eckart
from eckart.errors import EckartError
from eckart.fit import Metric, metric, regress
from eckart.fit.subspace import SubspaceSum
from eckart.hosts import map_of
from eckart.methods.compress.acip import MaskedSVD, MaskLearner, acip
from eckart.methods.compress.dobi_svd import CutOutputs
from eckart.methods.compress.goal import Goal
from eckart.methods.compress.job import Request, open_job
from eckart.methods.compress.maestro import OrderedFactors
from eckart.methods.compress.trp import Truncated
from eckart.methods.training import Course, train
from eckart.progress import silent


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def truncated(w: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).to(w.dtype)


# Maestro


def ordered(wanted, inputs: torch.Tensor, tmp_path) -> OrderedFactors:
    """Train random factors by ordered dropout on |U_b V_b x - wanted(x)|^2, all inputs in every step."""
    target = wanted(inputs)
    layer = OrderedFactors(0.3 * matrix(target.shape[1], 4, 1), 0.3 * matrix(4, inputs.shape[1], 2))

    def loss(step):
        layer.sample(step.generator)
        value = (layer(step.samples) - wanted(step.samples)).square().sum(-1).mean()
        return value, value

    course = Course(1200, 0.03, inputs.shape[0], final=0.0, save_every=10**6)
    train(layer, inputs, course, loss, state=tmp_path / "state.safetensors", seed=0, progress=silent)
    return layer


def test_ordered_dropout_recovers_the_svd_of_a_linear_map_on_isotropic_inputs(tmp_path):
    w = torch.diag(torch.tensor([2.0, 1.4, 0.9, 0.5])) @ torch.linalg.qr(matrix(5, 5))[0][:4]
    w = torch.linalg.qr(matrix(6, 6))[0][:, :4] @ w
    layer = ordered(lambda x: x @ w.mT, torch.eye(5), tmp_path)
    for rank in range(1, 5):
        assert (layer.factors(rank, metric()).dense() - truncated(w, rank)).norm() < 0.01 * w.norm(), rank


def test_ordered_dropout_recovers_the_principal_components_of_a_linear_autoencoder(tmp_path):
    x = matrix(40, 6) * torch.tensor([2.0, 1.5, 1.0, 0.7, 0.1, 0.1]) @ torch.linalg.qr(matrix(6, 6, 3))[0]
    layer = ordered(lambda rows: rows, x, tmp_path)
    directions = torch.linalg.svd(x, full_matrices=False)[2]
    for rank in range(1, 5):
        wanted = x @ directions[:rank].mT @ directions[:rank]
        assert (layer.factors(rank, metric())(x) - wanted).norm() < 0.01 * x.norm(), rank


def test_the_hierarchical_group_lasso_and_what_it_drops():
    layer = OrderedFactors(matrix(5, 4), matrix(4, 3, 1))
    expected = sum(layer.up[:, b:].norm() + layer.down[b:].norm() for b in range(4))
    torch.testing.assert_close(layer.penalty(), expected)
    with torch.no_grad():
        layer.up[:, 1] *= 1e-7  # small, but something behind it is not
        layer.up[:, 3] *= 1e-7
    layer.drop(1e-5)
    assert layer.rank == 3
    assert layer.scores()[3] == 0
    assert (layer.scores().diff() <= 0).all()
    torch.testing.assert_close(layer.matrix(), layer.up[:, :3].detach() @ layer.down[:3].detach())
    assert torch.isfinite(torch.autograd.grad(layer.penalty(), layer.up)[0]).all()
    layer.drop(1e9)
    assert layer.rank == 1


def test_it_starts_as_the_weight_and_its_prefixes_as_the_svd():
    w, x = matrix(7, 5), matrix(3, 5, 1)
    layer = OrderedFactors.of(w, torch.ones(7))
    torch.testing.assert_close(layer(x), F.linear(x, w, torch.ones(7)))
    layer.sampled = 2
    torch.testing.assert_close(layer(x), F.linear(x, truncated(w, 2), torch.ones(7)))


# ACIP


def masked(w: torch.Tensor, seen: Metric | None = None, *, folds: bool = False) -> MaskedSVD:
    return MaskedSVD(w, None, seen, 32, 0.0, torch.Generator().manual_seed(0), folds=folds)


def test_masks_start_open_and_pass_gradients_straight_through():
    w, x = matrix(9, 16), matrix(4, 16, 1)
    layer = masked(w)
    torch.testing.assert_close(layer(x), x @ w.mT, atol=1e-5, rtol=1e-5)
    assert layer.gate.detach().norm() == pytest.approx(1.0)
    above = matrix(4, 9, 2)
    with torch.no_grad():
        layer.gate[3] = -0.1
    (layer(x) * above).sum().backward()
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    expected = s * (u.mT @ above.mT @ x @ v.mT).diagonal() / layer.unit
    expected[3] = 0  # what is switched off stays off
    torch.testing.assert_close(layer.gate.grad, expected, atol=1e-4, rtol=1e-4)


def test_scores_are_the_order_in_which_masks_close():
    w = matrix(9, 16)
    layer = masked(w)
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(1))
        layer.gate.copy_(torch.linspace(0.1, 0.9, 9))
        for closing in (4, 0, 7):
            layer.gate[closing] = -1
            layer.count()
    assert layer.alive == 6
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    lora = layer._scale * layer.up.detach() @ layer.down.detach()
    kept: list[int] = []
    for rank, added in enumerate((8, 6, 5, 3, 2, 1, 7, 0, 4), 1):
        kept.append(added)
        expected = (u[:, kept] * s[kept]) @ v[kept] + lora
        torch.testing.assert_close(layer.target(rank), expected, atol=1e-4, rtol=1e-4)
    scores = layer.scores()
    assert (scores > 0).all()
    assert (scores.diff() < 0).all()
    assert layer._scale == 0.5  # 16 / 32, whatever rank the layer has room for


@pytest.mark.parametrize("rank", [1, 2, 3, 9, 14])
def test_a_held_layer_is_the_factors_it_folds_into(rank):
    w, x = matrix(16, 20), matrix(4, 20, 1)
    layer = masked(w, folds=True)
    assert layer.folded == 2  # an eighth of the layer's rank, not 32
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(1))
        layer.gate.copy_(torch.linspace(0.1, 0.9, 16))
        layer.gate[15] = -1
        layer.count()
    factors = layer.factors(rank, metric()).to(torch.float32)
    layer.hold(rank)
    assert layer.alive == max(rank - 2, 0)
    assert factors.rank == rank
    torch.testing.assert_close(factors(x), layer(x).detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.factors(rank, metric()).dense(), factors.dense(), atol=1e-4, rtol=1e-4)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["down", "up"]
    # the singular values kept are those of the largest masks that are open
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    kept = list(range(14, 16 - rank, -1))
    lora = 0.5 * layer.up.detach() @ layer.down.detach()
    torch.testing.assert_close(factors.dense(), (u[:, kept] * s[kept]) @ v[kept] + lora, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # what a tuning makes of the corrections is all kept
        layer.up.add_(matrix(*layer.up.shape, 2))
        layer.down.add_(matrix(*layer.down.shape, 3))
    torch.testing.assert_close(layer.factors(rank, metric())(x), layer(x).detach(), atol=1e-4, rtol=1e-4)


def test_corrections_are_what_a_layer_keeps_first_and_cost_a_dense_one_nothing():
    w = matrix(16, 20)
    layer = masked(w, folds=True)
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(1))
        layer.gate.copy_(torch.linspace(0.9, 0.1, 16))
    scores = layer.scores()
    assert scores.shape == (16,)
    assert (scores[:3] == scores[0]).all()
    assert (scores[2:].diff() < 0).all()
    lora = 0.5 * layer.up.detach() @ layer.down.detach()
    torch.testing.assert_close(layer.factors(2, metric()).dense(), lora, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.factors(1, metric()).dense().float(), truncated(lora, 1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(layer.matrix(), w + lora, atol=1e-4, rtol=1e-4)
    layer.hold(16)
    assert layer.alive == 16


def test_components_of_the_output_are_the_best_maps_of_every_rank():
    w, x = matrix(9, 16), matrix(400, 16, 1) * torch.linspace(0.1, 3, 16)
    seen = metric((x.mT @ x).double() / 400)
    layer, best = masked(w, seen), regress(w, seen, rank=9)
    for rank in (1, 4, 9):
        torch.testing.assert_close(layer.target(rank), best.factors(rank).dense().float(), atol=1e-4, rtol=1e-3)
    for basis, wanted in (("inputs", best.factors(4).dense().float()), ("plain", truncated(w, 4))):
        learner = MaskLearner(basis=basis, folds=False)
        searched = learner.layer(w, None, 1.0, torch.Generator(), seen)
        torch.testing.assert_close(searched.target(4), wanted, atol=1e-4, rtol=1e-3)
        assert [name for name, _ in searched.named_parameters() if learner.apart(f"0.q_proj.{name}")] == ["gate"]
    lost = torch.zeros(9, 16)
    lost[:4] = matrix(4, 16)
    assert masked(lost, seen).left.shape == (9, 9)  # also of a weight without full rank


# Trained rank pruning


def test_truncations_leave_the_share_of_energy_asked_for():
    w = matrix(8, 6)
    layer = Truncated(w, None)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(layer.isometry, u @ v, atol=1e-5, rtol=1e-5)
    shares = s.square().flip(0).cumsum(0).flip(0) / s.square().sum()
    torch.testing.assert_close(layer.scores(), shares.double(), atol=1e-5, rtol=1e-5)
    layer.truncate(0.8)
    rank = int((shares > 0.2).sum())
    assert 0 < rank < 6
    torch.testing.assert_close(layer.matrix(), truncated(w, rank), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.isometry, u[:, :rank] @ v[:rank], atol=1e-5, rtol=1e-5)


# Dobi-SVD


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_whole_position_cuts_the_outputs_at_that_rank(rank):
    w, x = matrix(5, 7), matrix(12, 7, 1).view(2, 6, 7)
    layer = CutOutputs(w, torch.ones(5), 0.5, 10.0)
    with torch.no_grad():
        layer.position.fill_(rank / 5)
    y = (x @ w.mT).view(12, 5)
    wanted = truncated(y, rank).view(2, 6, 5) + 1
    torch.testing.assert_close(layer(x), wanted, atol=2e-3, rtol=1e-3)
    assert layer.size().item() == pytest.approx(min(12 * rank, 35))
    assert layer.outside() == 0
    error = (layer(x) - 1 - y.view(2, 6, 5)).square().sum()
    assert torch.autograd.grad(error, layer.position)[0] <= 0  # more rank, less error


def test_positions_begin_where_all_layers_meet_the_budget():
    layer = CutOutputs(matrix(30, 20), None, 0.4, 10.0)
    assert layer.size().item() == pytest.approx(0.4 * 600)
    assert (layer.scores().diff() < 0).all()


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("tokens", [6, 3])  # more than outputs, and fewer
def test_a_weight_is_projected_on_what_leading_outputs_of_sequences_share(rank, tokens):
    w, x = matrix(5, 7), matrix(3 * tokens, 7, 1).view(3, tokens, 7)
    total, expected = SubspaceSum(5, rank), torch.zeros(5, 5)
    total.add((x @ w.mT)[:2])
    total.add((x @ w.mT)[2:])
    for y in x @ w.mT:
        v = torch.linalg.svd(y, full_matrices=False).Vh[:rank]
        expected += v.mT @ v
    axes = torch.linalg.eigh(expected).eigenvectors[:, -rank:]
    factors = total.factors(w)
    torch.testing.assert_close(factors.up.mT @ factors.up, torch.eye(rank), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(factors.dense(), axes @ axes.mT @ w, atol=1e-4, rtol=1e-4)


def test_a_short_sequence_adds_no_directions_that_it_does_not_have():
    total = SubspaceSum(8, 3)
    for axes in ((2, 5, 5), (7, 7, 7)):
        total.add(torch.eye(8)[list(axes)])  # three tokens, fewer directions
    expected = torch.zeros(8)
    expected[[2, 5, 7]] = 1
    torch.testing.assert_close(total.factors(torch.eye(8)).dense(), expected.diag(), atol=1e-6, rtol=0)


# What they do to a model

QUICK = {"samples": 4, "length": 48, "keep": 0.7}


def compressed_matrices(folder) -> dict[str, torch.Tensor]:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    names = [name for name, m in model.named_modules() if name.endswith("_proj")]
    return {name: map_of(model.get_submodule(name)).dense() for name in names}


def test_output_pca_and_an_untrained_start_on_inputs_are_the_optimum_of_svd_llm(demo, text, tmp_path):
    """The paper's own claim for the first, with all methods at the same ranks."""
    uniform = {"allocation": "uniform"}
    tokens = {"steps": 1, "components": "tokens", **uniform}
    runs = {
        "svd-llm": {"update": False},
        "pela": {"start": "inputs", "tune": 0},
        "dobi-svd": tokens,
    }
    held = {}
    for method, settings in runs.items():
        arguments = {**QUICK, "method": method, "settings": settings, "calibration": text}
        held[method] = compressed_matrices(eckart.compress(demo, tmp_path / method, **arguments).out)
    for method in ("pela", "dobi-svd"):
        for name, wanted in held["svd-llm"].items():
            assert (held[method][name] - wanted).norm() < 2e-3 * wanted.norm(), (method, name)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dobi-svd", {"steps": 2, "batch": 2, "components": "tokens"}),
        ("acip", {"steps": 4, "tune": 3, "rate": 3e-3}),
        ("pela", {"tune": 3, "storage": "pivoted"}),
    ],
)
def test_what_was_trained_is_stored_in_codes(method, settings, demo, text, tmp_path):
    arguments = {**QUICK, "method": method, "calibration": text}
    outcomes = {
        bits: eckart.compress(demo, tmp_path / str(bits), settings={**settings, "bits": bits}, **arguments)
        for bits in (0, 8)
    }
    kind = settings.get("storage", "lowrank")
    assert {layer.structure for layer in outcomes[8].plan.layers} <= {f"{kind} int8", "int8"}
    planned = eckart.plan(demo, settings={**settings, "bits": 8}, **arguments)
    assert planned.bytes_after == outcomes[8].plan.bytes_after
    assert outcomes[8].plan.parameters_after == outcomes[0].plan.parameters_after
    assert outcomes[8].plan.bytes_after < 0.6 * outcomes[0].plan.bytes_after
    assert outcomes[8].measured.after == pytest.approx(outcomes[0].measured.after, abs=0.05)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("pela", {"tune": 30}),
        ("pela", {"tune": 30, "features": 0.0, "departure": 0.0, "storage": "pivoted"}),
        ("maestro", {"steps": 15, "tune": 15}),
        ("trp", {"steps": 20, "interval": 10}),
        ("acip", {"steps": 30, "tune": 15, "rate": 3e-3, "growth": 1.3, "trained": "factors", "basis": "inputs"}),
    ],
)
def test_training_beats_the_plain_svd(method, settings, demo, text, tmp_path):
    arguments = {"samples": 32, "length": 48, "keep": 0.7, "calibration": text}
    plain = eckart.compress(demo, tmp_path / "plain", method="svd", **arguments)
    trained = eckart.compress(demo, tmp_path / "trained", method=method, settings=settings, **arguments)
    assert trained.measured.before == pytest.approx(plain.measured.before, abs=1e-4)
    assert trained.measured.after < plain.measured.after - 1
    assert 0.69 <= trained.plan.kept <= 0.7


def test_corrections_are_tuned(demo, text, tmp_path):
    arguments = {"method": "acip", "samples": 16, "length": 48, "keep": 0.8, "calibration": text, "check": False}
    after = []
    for tune in (0, 15):
        settings = {"steps": 8, "tune": tune, "rate": 1e-2, "growth": 1.3}
        outcome = eckart.compress(demo, tmp_path / str(tune), settings=settings, **arguments)
        after.append(outcome.measured.after)
        assert 0.79 <= outcome.plan.kept <= 0.8
    assert after[1] < after[0] - 0.1


def test_one_search_serves_all_budgets(demo, text, quick, tmp_path):
    ranks, starts = [], []
    for keep in (0.8, 0.6):
        stages: list[tuple[str, int]] = []
        out = eckart.compress(
            demo,
            tmp_path / str(keep),
            keep=keep,
            progress=lambda s, i, n, at=stages: at.append((s, i)),
            **quick("acip"),
        )
        starts.append(next(i for stage, i in stages if stage == "train"))
        ranks.append({layer.name: layer.rank for layer in out.plan.layers})
    assert starts == [0, 4]
    assert all(ranks[1][name] <= rank for name, rank in ranks[0].items())


def test_a_search_of_other_defaults_is_not_taken_for_this_one(demo, quick, cache, monkeypatch):
    search, stages = {}, set()
    for penalty in (1e-3, 1e-2):
        defaults = acip.__kwdefaults__ | {"penalty": penalty}
        monkeypatch.setattr(acip, "__kwdefaults__", defaults)
        eckart.plan(demo, keep=0.8, progress=lambda stage, i, n: stages.add(stage), **quick("acip"))
        search[penalty] = {path.name for path in cache.glob("statistics-*/search-*")}
    assert len(search[1e-2] - search[1e-3]) == 1
    assert "train" in stages
    assert "tune" not in stages  # a plan needs the ranks only


def test_a_run_that_diverges_ends_in_a_sentence_and_keeps_its_state(demo, text, tmp_path, cache):
    arguments = {**QUICK, "method": "trp", "settings": {"steps": 30, "rate": 1e3}, "calibration": text}
    with pytest.raises(EckartError, match=r"the train run diverged at step .*; use a smaller learning rate"):
        eckart.compress(demo, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    assert list(cache.glob("statistics-*/search-*.safetensors"))


def test_transposed_layers_with_biases(demo, text, tmp_path):
    """GPT-2 stores its weights as (in, out), and all of its layers have biases."""
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    hf.AutoTokenizer.from_pretrained(demo).save_pretrained(tmp_path / "gpt2")
    arguments = {"samples": 4, "length": 32, "keep": 0.8, "calibration": text}
    for method in ("acip", "maestro", "pela"):
        settings = {"tune": 2} if method == "pela" else {"steps": 2, "tune": 2}
        out = eckart.compress(tmp_path / "gpt2", tmp_path / method, method=method, settings=settings, **arguments)
        model = hf.AutoModelForCausalLM.from_pretrained(out.out, dtype=torch.float32)
        assert eckart.evaluate(out.out, text=text, limit=2).nats_per_token < 8
        assert out.plan.kept <= 0.8
        assert model.transformer.h[0].mlp.c_fc is not None


# Embeddings

EMBEDDED = [
    ("pela", {"tune": 2}),
    ("pela", {"tune": 2, "start": "inputs", "storage": "pivoted", "allocation": "knapsack"}),
    ("trp", {"steps": 4, "interval": 2, "tune": 2}),
    ("maestro", {"steps": 2, "tune": 2}),
    ("acip", {"steps": 4, "tune": 2, "rate": 3e-3}),
    ("dobi-svd", {"steps": 2, "bits": 8}),
]


@pytest.mark.parametrize(("method", "settings"), EMBEDDED, ids=[f"{m}-{i}" for i, (m, _) in enumerate(EMBEDDED)])
@pytest.mark.parametrize("kind", ["decoder", "BertModel", "BertForMaskedLM"])
def test_an_embedding_gets_the_share_of_all_layers(kind, method, settings, demo, text, tmp_path):
    folder = demo if kind == "decoder" else encoder(kind, demo, tmp_path / "dense")
    arguments = {"samples": 8, "length": 48, "keep": 0.6, "calibration": text, "method": method}
    arguments["settings"] = {**settings, "embeddings": True}
    planned = eckart.plan(folder, **arguments)
    out = eckart.compress(folder, tmp_path / "out", **arguments)
    assert 0.58 <= out.plan.kept <= 0.6
    assert [(layer.name, layer.rank) for layer in planned.layers] == [(x.name, x.rank) for x in out.plan.layers]
    table = next(layer for layer in out.plan.layers if layer.kind == "embedding")
    whole = sum(layer.numbers for layer in out.plan.layers) / sum(layer.dense_numbers for layer in out.plan.layers)
    if "knapsack" not in settings.values():
        assert abs(table.numbers - whole * table.dense_numbers) < 2 * sum(table.shape)  # but for whole ranks
    assert out.checked.difference < 1e-3  # the folder answers as the model in memory did, with the embedding in place


# Encoders


def encoder(kind: str, demo, folder):
    """Write a small encoder with layers that matter; return its folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = hf.BertConfig(vocab_size=512, max_position_embeddings=64, initializer_range=0.3, **sizes)
    getattr(hf, kind)(config).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(demo).save_pretrained(folder)
    return folder


def answers(folder, lines) -> list[torch.Tensor]:
    """Return sentence embeddings, or log-probabilities of tokens, of lines of text one by one."""
    model = eckart.load(folder, dtype=torch.float32).eval()
    tokenizer, out = hf.AutoTokenizer.from_pretrained(folder), []
    for line in lines:
        with torch.no_grad():
            found = model(input_ids=tokenizer(line, return_tensors="pt")["input_ids"][:, :48])
        headless = "last_hidden_state" in found
        out.append(F.normalize(found[0].mean(1), dim=-1) if headless else found.logits.log_softmax(-1))
    return out


LINES = {"samples": 96, "length": 48, "keep": 0.7}
TRAINED = [
    ("pela", {"tune": 40}),
    ("pela", {"tune": 40, "features": 0.0, "departure": 0.0, "storage": "pivoted"}),
    ("maestro", {"steps": 20, "tune": 20}),
    ("trp", {"steps": 20, "interval": 10, "tune": 20}),
    ("acip", {"steps": 30, "tune": 40, "rate": 3e-3, "growth": 1.3, "trained": "factors"}),
    ("dobi-svd", {"steps": 5, "tune": 30}),
    ("svd", {"heal": 6, "heal_kind": "lora", "heal_rate": 3e-3}),
]


@pytest.mark.parametrize(("method", "settings"), TRAINED, ids=[f"{m}-{i}" for i, (m, _) in enumerate(TRAINED)])
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_encoders_are_trained_towards_the_original(kind, method, settings, demo, text, tmp_path):
    folder = encoder(kind, demo, tmp_path / "dense")
    arguments = {**LINES, "calibration": text}
    plain = eckart.compress(folder, tmp_path / "plain", method="svd", **arguments)
    trained = eckart.compress(folder, tmp_path / "out", method=method, settings=settings, **arguments)
    assert trained.measured.name == {"BertModel": "distance", "BertForMaskedLM": "divergence"}[kind]
    assert trained.measured.before == 0
    assert trained.measured.after < 0.8 * plain.measured.after
    assert trained.plan.kept <= 0.7
    assert trained.checked.what == {"BertModel": "hidden states", "BertForMaskedLM": "logits"}[kind]


@pytest.mark.parametrize("embeddings", [False, True])
def test_what_an_encoder_is_measured_by(embeddings, demo, tmp_path):
    folder = encoder("BertModel", demo, tmp_path / "dense")
    lines = [f"once there were {i} trees and {'a bird ' * (i % 5)}." for i in range(40)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    arguments = {"calibration": tmp_path / "lines.txt", "samples": 40, "keep": 0.7}
    settings = {"tune": 3, "embeddings": embeddings}
    out = eckart.compress(folder, tmp_path / "out", method="pela", settings=settings, **arguments)
    assert not out.measured.held_out
    pairs = zip(answers(folder, lines), answers(out.out, lines), strict=True)
    expected = torch.stack([(a - b).square().sum() for a, b in pairs]).mean()
    assert out.measured.after == pytest.approx(float(expected), rel=1e-3)


def test_a_sentence_encoder_whose_training_was_stopped_ends_in_the_same_bytes(demo, text, tmp_path):
    folder = encoder("BertModel", demo, tmp_path / "dense")
    settings = {"steps": 4, "tune": 4, "interval": 2}
    arguments = {**LINES, "method": "trp", "settings": settings, "calibration": text, "check": False, "cache": False}

    class Stop(Exception):
        pass

    def stop(stage, index, of):
        if stage == "tune" and index == 2:
            raise Stop

    whole = eckart.compress(folder, tmp_path / "whole", **arguments)
    with pytest.raises(Stop):
        eckart.compress(folder, tmp_path / "stopped", progress=stop, **arguments)
    again = eckart.compress(folder, tmp_path / "stopped", **arguments)
    files = [(out.out / "model.safetensors").read_bytes() for out in (whole, again)]
    assert files[0] == files[1]


def test_a_step_of_an_encoder_has_the_tokens_of_a_decoders(demo, text, tmp_path):
    folder = encoder("BertModel", demo, tmp_path / "dense")
    request = Request(folder, "pela", 0.7, text, 300, 12, 0, {})
    goal = Goal(open_job(request, silent), None)
    found = goal.samples(8)
    assert sum(len(ids) for ids in found) == 300
    for length in {ids.shape[1] for ids in found}:
        sizes = [len(ids) for ids in found if ids.shape[1] == length]
        room = 8 * 256 // length
        assert sizes == [room] * (sum(sizes) // room) + [sum(sizes) % room] * (sum(sizes) % room > 0), length
    assert max(ids.numel() for ids in found) > 1024
