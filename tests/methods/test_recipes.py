"""The table of methods: each page is a recipe, every setting is typed, and any answer can be replaced by another's."""

import inspect

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eckart
from eckart.errors import EckartError
from eckart.files.inspect import show
from eckart.fit import regress
from eckart.methods.compress.allocate import allocate
from eckart.methods.compress.corrections import corrected
from eckart.methods.compress.job import Request, open_job, statistics_store
from eckart.methods.compress.layers import Known, layers_of, weights
from eckart.methods.compress.recipe import COMMON, LayerData, Recipe, normalized_spectrum, overridden
from eckart.methods.compress.table import METHODS, recipe_of, settings_of, source_of, summary_of
from eckart.progress import silent
from eckart.stats import CrossSum, Store, collect_gradients, collect_inputs

NAMES = list(METHODS)
# The others find their maps by training, or remove blocks and have none.
CLOSED_FORM = [
    name
    for name in NAMES
    if recipe_of(name).removal is None and ((learner := recipe_of(name).learner) is None or learner.search is None)
]


@pytest.mark.parametrize("method", NAMES)
def test_every_page_says_what_it_is(method):
    recipe, source = recipe_of(method), source_of(method)
    assert isinstance(recipe, Recipe)
    assert summary_of(method).endswith((".", "refines"))
    for part in ("Structure:", "Budget:", "Trained"):
        assert part in source, part
    assert len(source.splitlines()) >= 5
    for parameter in inspect.signature(METHODS[method]).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize("method", NAMES)
def test_every_setting_has_a_default_that_is_allowed(method):
    settings = settings_of(method)
    assert set(COMMON) <= set(settings)
    defaults = {name: s.default for name, s in settings.items()}
    one_by_one = [recipe_of(method, {name: value}) for name, value in defaults.items()]
    assert len(one_by_one) == len(settings)
    recipe = recipe_of(method, defaults)
    for name in COMMON:
        assert getattr(recipe, name) == getattr(recipe_of(method), name)


def test_published_defaults():
    assert recipe_of("aa-svd").heal == 25
    assert recipe_of("svd-llm").update
    assert not recipe_of("svd-llm", {"update": False}).update
    assert recipe_of("welore").allocation == "threshold"
    assert recipe_of("asvd").allocation == "sensitivity"
    assert recipe_of("lord").allocation == "uniform-rank"
    assert settings_of("kfac")["input_shrinkage"].default == 0.1
    assert settings_of("kfac")["output_shrinkage"].default == 0.3
    assert settings_of("asvd")["alpha"].default == 0.5
    assert settings_of("acip")["stop"].default == 0.4
    assert settings_of("maestro")["threshold"].default == 1e-5
    assert settings_of("trp")["penalty"].default == 3e-4
    assert settings_of("dobi-svd")["beta"].default == 10
    assert {m for m in NAMES if not recipe_of(m).needs_text} == {"svd", "welore", "rtn"}
    assert {m for m in NAMES if recipe_of(m).uses_gradients} == {"fwsvd", "kfac", "eckart", "eckart-mixed"}


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("cospadi", {"allocation": "threshold"}, "allocation=threshold knows low-rank maps only, and this method uses"),
        ("rocket", {"allocation": "uniform"}, "allocation=uniform cannot choose among structures; use knapsack"),
        ("cospadi", {"ratio": 0.5}, "ratio must be at least 1, got 0.5"),
        ("compot", {"iterations": -1}, "iterations must be at least 0, got -1"),
        ("oats", {"rank_share": 1.0}, r"rank_share must lie in \[0, 1\), got 1.0"),
        ("svd", {"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, or 0 for no codes, got 7"),
        ("eckart-mixed", {"period": 1}, "period must be 0, for no maps N:M, or 2 to 256, got 1"),
        ("eckart-mixed", {"levels": "learned"}, "codes of several widths have uniform levels, got levels=learned"),
        (
            "eckart-mixed",
            {"kronecker": True, "bits": 4},
            "numbers of kronecker are not stored in codes; leave bits at 0",
        ),
        (
            "eckart-mixed",
            {"neurons": "always", "allocation": "uniform"},
            "cannot choose among structures; use knapsack",
        ),
        ("eckart", {"group_size": 0}, "group_size is the number of entries that share a scale, at least 1, got 0"),
        ("lrq", {"levels": "learned"}, "codes are learned for uniform levels only; give levels=uniform"),
        ("lrq", {"rank": 0}, "rank must be at least 1, got 0"),
        ("gptq", {"bits": 0}, "bits=0 leaves this method nothing to do; give 2, 3, 4, 5, 6 or 8"),
        ("modegpt", {"allocation": "knapsack"}, "allocation=knapsack does not know hidden units; use uniform or infl"),
        ("slicegpt", {"storage": "pivoted"}, "slicing changes the whole model at once: leave allocation, storage"),
        ("fusegpt", {"embeddings": True}, "removing blocks changes the whole model at once: leave allocation, storage"),
        ("fusegpt", {"bits": 4, "storage": "pivoted"}, "removing blocks changes the whole model at once: leave alloc"),
        ("fusegpt", {"base_rate": 0.0}, "base_rate must be positive, got 0.0"),
        ("svd", {"heal_kind": "lora", "heal": 1, "bits": 4}, "heal_kind=lora trains the factors of low-rank and pivot"),
        ("modegpt", {"heal_kind": "lora", "heal": 1}, "for other structures and for bits leave heal_kind=blockwise"),
        ("cospadi", {"heal_kind": "lora", "heal": 1}, "for other structures and for bits leave heal_kind=blockwise"),
        ("svd", {"heal_rank": 0}, "heal_rank must be at least 1, got 0"),
        ("modegpt", {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ("svd", {"allocation": "zero-sum"}, "allocation=zero-sum needs the gradients of the weights, which zs-svd"),
        ("zs-svd", {"embeddings": True}, "zero-sum scores know linear layers only; leave embeddings=false"),
        ("rocket", {"balance": 2}, r"balance must lie in \[0, 1\], got 2"),
        ("basis-sharing", {"group": 1}, "group must be at least 2, got 1"),
        ("basis-sharing", {"rounds": -1}, "rounds must be at least 0, got -1"),
        ("basis-sharing", {"allocation": "calibrated"}, "allocation=calibrated looks at one layer at a time, and this"),
        ("concatenated-svd", {"threshold": 0}, "threshold must be positive, got 0"),
        ("concatenated-svd", {"algorithm": "greedy"}, "must be one of union, residual, incremental, got 'greedy'"),
        ("cospadi", {"group": 0}, "group must be at least 1, got 0"),
        ("cospadi", {"group": 2, "allocation": "threshold"}, "allocation=threshold knows low-rank maps only"),
        ("maestro", {"heal": 1}, "heal does not go with this method, which trains the whole model"),
        ("acip", {"allocation": "knapsack"}, "allocation=knapsack does not go with this method; choose one of uniform"),
        ("pela", {"allocation": "threshold"}, "allocation=threshold does not go with this method; choose one of unif"),
        ("trp", {"steps": 0}, "steps must be at least 1, got 0"),
        ("acip", {"tune": -1}, "a number of steps must not be negative, got -1"),
        ("dobi-svd", {"rate": 0.0}, "rate must be positive, got 0.0"),
    ],
)
def test_answers_that_do_not_go_together(method, settings, message):
    with pytest.raises(EckartError, match=message):
        recipe_of(method, settings)


def test_only_common_answers_are_overridden():
    assert overridden(recipe_of("svd"), storage="pivoted").storage == "pivoted"
    with pytest.raises(EckartError, match="'metric' is not a setting common to all methods; those are allocation"):
        overridden(recipe_of("svd"), metric=None)


def known_of(demo, text, method: str, folder, **settings) -> Known:
    """The statistics a method asks for, of a few samples."""
    job = open_job(Request(demo, method, recipe_of(method).usual_keep, text, 4, 48, 0, settings), silent)
    store, boundaries = statistics_store(job, folder), Store(folder / "boundaries")
    if job.recipe.needs_text:
        collect_inputs(job.runner, job.calibration, store, boundaries=boundaries)
    if job.recipe.uses_gradients or job.recipe.uses_weight_gradients:
        collect_gradients(
            job.runner, job.calibration, job.objective, store, boundaries, weights=job.recipe.uses_weight_gradients
        )
    return Known(job, store)


NAME = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def inputs(demo, text) -> torch.Tensor:
    """What that layer is given in the whole model, (vectors, n) float64."""
    job = open_job(Request(demo, "svd-llm", 0.7, text, 4, 48, 0, {}), silent)
    model, seen = AutoModelForCausalLM.from_pretrained(demo).eval(), []
    model.get_submodule(NAME).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for ids in job.calibration:
            model(ids)
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


# Whose metric is the input's second moment, whatever else they do.
WHITENED = {
    *("svd-llm", "svd-llm-v2", "zs-svd", "modegpt", "slicegpt"),
    *("basis-sharing", "concatenated-svd", "aa-svd", "cospadi", "compot", "rocket", "oats", "gptq"),
}


def by_the_paper(method: str, w: torch.Tensor, x: torch.Tensor, known: Known, rank: int) -> torch.Tensor:
    """The formula of each paper, written out."""
    g = x.mT @ x / x.shape[0]
    if method in ("svd", "welore", "rtn", "lrq", "pela"):
        return truncated(w, rank)
    if method in ("asvd", "any4"):
        scale = x.abs().mean(0)
        scale = scale.sqrt() if method == "asvd" else scale
        return truncated(w * scale, rank) / scale
    if method in WHITENED:
        root = torch.linalg.cholesky(g)
        return torch.linalg.solve_triangular(root, truncated(w @ root, rank), upper=False, left=False)
    if method in ("afm", "lord"):
        y = x @ w.mT
        directions = torch.linalg.eigh((y - y.mean(0)).mT @ (y - y.mean(0))).eigenvectors[:, -rank:]
        return directions @ directions.mT @ w
    gradients = known.data(layer_of(known), w).gradients
    if method == "fwsvd":
        rows = gradients.row_fisher.sqrt()[:, None]
        return truncated(rows * w, rank) / rows
    input_share, output_share = {"kfac": (0.1, 0.3)}.get(method, (0.01, 0.03))
    a, b = shrunk(g, input_share), shrunk(gradients.second, output_share)
    left, right = torch.linalg.cholesky(b), torch.linalg.cholesky(a)
    inner = truncated(left.mT @ w @ right, rank)
    return torch.linalg.solve(left.mT, torch.linalg.solve_triangular(right, inner, upper=False, left=False))


def shrunk(moment: torch.Tensor, share: float) -> torch.Tensor:
    return (1 - share) * moment + share * moment.diagonal().mean() * torch.eye(moment.shape[0]).double()


def layer_of(known: Known):
    return next(layer for layer in layers_of(known.job) if layer.name == NAME)


@pytest.mark.parametrize("method", CLOSED_FORM)
def test_the_metric_of_every_method_gives_the_formula_of_its_paper(method, demo, text, inputs, tmp_path):
    known = known_of(demo, text, method, tmp_path)
    ((layer, weight),) = weights(known.job, [layer_of(known)])
    got = regress(weight, known.metric(layer, weight)).fit(20, dtype=torch.float64).map.dense()
    expected = by_the_paper(method, weight.double(), inputs, known, 20)
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_the_anchored_metric_regresses_on_what_the_layer_sees(demo, text, inputs, tmp_path):
    torch.manual_seed(0)
    shifted = inputs + 0.3 * inputs.std() * torch.randn_like(inputs)
    total = CrossSum(inputs.shape[1])
    total.add(shifted, inputs)
    cross = total.result("a layer")
    known = known_of(demo, text, "aa-svd", tmp_path)
    ((layer, weight),) = weights(known.job, [layer_of(known)])
    full = min(weight.shape)
    for anchor, target in ((1.0, inputs), (0.0, shifted)):
        known.job = open_job(Request(demo, "aa-svd", 0.7, text, 4, 48, 0, {"anchor": anchor}), silent)
        got = regress(weight, known.metric(layer, weight, cross)).fit(full, dtype=torch.float64).map.dense()
        best = torch.linalg.lstsq(shifted, target @ weight.double().mT).solution.mT
        assert (got - best).norm() < 1e-2 * best.norm(), anchor


def test_spectra_are_normalized_as_in_welore():
    weight = torch.randn(12, 9, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    score = normalized_spectrum(LayerData(weight), regress(weight, recipe_of("svd").metric(None)))
    expected = torch.cat([(values - values[-1]) / (values[0] - values[-1]), torch.zeros(1)])
    torch.testing.assert_close(score, expected.double(), atol=1e-7, rtol=0)


OVERRIDES = [
    {"storage": "pivoted"},
    {"allocation": "knapsack"},
    {"allocation": "calibrated"},
    {"allocation": "calibrated", "gamma": 0.5},
    {"allocation": "uniform-rank"},
    {"allocation": "log-loss"},
    {"allocation": "influence"},
    {"embeddings": True},
    {"embeddings": True, "storage": "pivoted", "allocation": "knapsack"},
    {"round_to": 8},
    {"heal": 1},
    {"heal": 1, "heal_kind": "lora"},
    {"bits": 8},
    {"bits": 4, "heal": 1},
    {"bits": 4, "embeddings": True, "storage": "pivoted"},
    {"bits": 3, "embeddings": True, "levels": "learned", "symmetric": True},
]


@pytest.mark.parametrize("settings", OVERRIDES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_any_answer_can_be_replaced(settings, demo, text, tmp_path):
    arguments = {"calibration": text, "samples": 2, "length": 32, "keep": 0.7, "settings": settings}
    bits = settings.get("bits", 0)
    outcome = eckart.compress(demo, tmp_path / "out", method="svd-llm", **arguments)
    compressed = [layer for layer in outcome.plan.layers if layer.structure not in ("dense", f"int{bits}")]
    assert 0.685 <= outcome.plan.kept <= 0.7
    assert all(layer.numbers < layer.dense_numbers for layer in compressed)
    named = settings.get("storage", "lowrank") + (f" int{bits}" if bits else "")
    assert {layer.structure for layer in compressed} == {named}
    held = load_file(outcome.out / "model.safetensors")
    assert sum(t.nbytes for t in held.values()) == outcome.plan.bytes_after == show(outcome.out).nbytes
    planned = eckart.plan(demo, method="svd-llm", **arguments)
    assert planned.bytes_after == outcome.plan.bytes_after
    if settings.get("embeddings"):
        assert outcome.plan.layers[0].kind == "embedding"
        assert outcome.plan.layers[0].structure != "dense"
    if "round_to" in settings:
        assert all(layer.rank % 8 == 0 for layer in compressed)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(outcome.out).eval()
        assert torch.isfinite(model(torch.arange(1, 20)[None]).logits).all()


@pytest.mark.parametrize("method", ["kfac", "eckart", "fwsvd", "afm"])
def test_embeddings_of_other_methods(method, demo, text, tmp_path):
    settings = {"embeddings": True}
    arguments = {"calibration": text, "samples": 2, "length": 32, "keep": 0.5, "settings": settings}
    outcome = eckart.compress(demo, tmp_path / "out", method=method, **arguments)
    assert outcome.plan.layers[0].structure != "dense"
    assert 0.49 <= outcome.plan.kept <= 0.5


def test_pivoted_storage_gives_more_rank_for_the_same_numbers(demo):
    ranks = []
    for name in ("lowrank", "pivoted"):
        plan = eckart.plan(demo, method="svd", keep=0.7, settings={"storage": name})
        ranks.append(sum(layer.rank for layer in plan.layers if layer.structure != "dense"))
    assert ranks[1] > 1.2 * ranks[0]


def test_healing_lowers_the_loss(demo, text, tmp_path):
    arguments = {"calibration": text, "samples": 16, "length": 64, "keep": 0.7, "method": "svd"}
    plain = eckart.compress(demo, tmp_path / "plain", **arguments)
    healed = eckart.compress(demo, tmp_path / "healed", settings={"heal": 20, "heal_rate": 1e-3}, **arguments)
    assert healed.measured.after < plain.measured.after - 0.1
    assert healed.plan.parameters_after == plain.plan.parameters_after


def test_the_update_of_svd_llm_fits_what_the_compressed_model_sees(demo, text, tmp_path):
    arguments = {"calibration": text, "samples": 12, "length": 64, "keep": 0.6, "method": "svd-llm"}
    loss = {}
    for update in (False, True):
        outcome = eckart.compress(demo, tmp_path / str(update), settings={"update": update}, **arguments)
        loss[update] = outcome.measured.after
    first = "model.layers.0.self_attn.q_proj.up.weight"  # sees what it always saw, where the update changes nothing
    before, after = (load_file(tmp_path / str(u) / "model.safetensors") for u in (False, True))
    torch.testing.assert_close(before[first], after[first], atol=1e-3, rtol=1e-3)
    assert loss[True] < loss[False] - 0.05


def test_corrections_step_along_the_gradient_at_the_truncated_weights(demo, text, tmp_path):
    """The step is the projection of the way back on the gradient of one sample with all layers truncated."""
    known = known_of(demo, text, "zs-svd", tmp_path, corrections=1)
    job, layers = known.job, layers_of(known.job)
    last = corrected(job, layers, known, tmp_path / "work", silent)
    chosen = allocate(job, layers, known, predict=False, progress=silent).chosen
    cut = [layer for layer in layers if chosen[layer.name].structure != "dense"]
    assert len(cut) > 0
    model, kept = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval(), {}
    for layer, weight in weights(job, cut):
        rank = chosen[layer.name].rank
        kept[layer.name] = regress(weight, known.metric(layer, weight)).factors(rank).dense().float()
        model.get_submodule(layer.name).weight.data.copy_(kept[layer.name])
    windows = torch.cat(job.calibration)
    drawn = torch.randint(len(windows), (1,), generator=torch.Generator().manual_seed(0))
    job.objective.scalar(model(windows[drawn]), windows[drawn], None).backward()
    for (layer, original), (_, found) in zip(weights(job, cut), weights(last.job, cut), strict=True):
        g, way = model.get_submodule(layer.name).weight.grad, original - kept[layer.name]
        expected, step = (way * g).sum() / g.square().sum() * g, found - kept[layer.name]
        assert (step - expected).norm() < 0.01 * expected.norm() + 1e-6 * original.norm(), layer.name
    rest = [layer for layer in layers if layer not in cut]
    for (_, original), (_, found) in zip(weights(job, rest), weights(last.job, rest), strict=True):
        assert torch.equal(original, found)
    again = corrected(job, layers, known, tmp_path / "work", silent)  # goes on behind what is complete
    for (_, one), (_, other) in zip(weights(last.job, layers), weights(again.job, layers), strict=True):
        assert torch.equal(one, other)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["correction-01"]


def test_zero_sum_scores_are_the_first_order_change_of_the_loss(demo, text, tmp_path):
    """The score of a rank is the slope of the calibration loss on the way from W to W without the values dropped."""
    known = known_of(demo, text, "zs-svd", tmp_path)
    ((layer, weight),) = weights(known.job, [layer_of(known)])
    regression = regress(weight, known.metric(layer, weight))
    scores = known.scores(layer, weight, regression)
    assert scores.shape == (min(weight.shape) + 1,)
    assert scores[-1] == 0
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float64).eval()
    parameter = model.get_submodule(NAME).weight
    tokens = sum(ids.numel() for ids in known.job.calibration)
    for rank in (0, 20, 50):
        dropped = weight.double() - regression.factors(rank).dense().double()
        losses = []
        for step in (0.01, -0.01):
            with torch.no_grad():
                parameter.copy_(weight.double() - step * dropped)
                losses.append(sum(float(known.job.objective.scalar(model(i), i, None)) for i in known.job.calibration))
        slope = (losses[0] - losses[1]) / 0.02 / tokens
        assert slope == pytest.approx(float(scores[rank]), rel=0.02, abs=2e-5)
