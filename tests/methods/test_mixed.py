"""The families that eckart-mixed offers if asked: fewer hidden units of whole MLPs, sums of Kronecker products."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import eckart
from eckart.fit.families import kronecker_family
from eckart.methods.compress.collect import collect
from eckart.methods.compress.job import Request, open_job, statistics_store
from eckart.methods.compress.layers import Known, layers_of, weights
from eckart.methods.compress.narrowing import narrower_sets
from eckart.methods.compress.outcome import LayerPlan, Outcome
from eckart.progress import silent
from eckart.stats import Store

IDS = torch.arange(1, 41).view(2, 20)


@pytest.fixture(scope="module", autouse=True)
def _few_sizes():
    """Fit every family at three sizes only, which takes a fifth of the time; of hidden units all sizes are offered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eckart.fit.families.SHARES", (0.1, 0.3, 0.6))
        yield


@pytest.fixture(scope="module")
def narrow(demo, quick, tmp_path_factory) -> Outcome:
    """The demonstration model so small that narrow MLPs are predicted to lose least."""
    folder = tmp_path_factory.mktemp("narrow")
    return eckart.compress(demo, folder / "out", keep=0.2, cache=False, **quick("eckart-mixed", neurons="always"))


def load(folder: Path) -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def by_mlp(rows: tuple[LayerPlan, ...]) -> dict[str, list[LayerPlan]]:
    out: dict[str, list[LayerPlan]] = {}
    for row in rows:
        if ".mlp." in row.name:
            out.setdefault(row.name.rpartition(".")[0], []).append(row)
    return out


def test_an_mlp_is_narrow_as_a_whole_or_not_at_all(narrow):
    mlps = by_mlp(narrow.plan.layers)
    assert len(mlps) == 5
    assert any(row.structure == "neurons" for row in narrow.plan.layers)
    for rows in mlps.values():
        if any(row.structure == "neurons" for row in rows):
            assert {(row.structure, row.rank) for row in rows} == {("neurons", rows[0].rank)}
            assert all(row.numbers == row.dense_numbers * row.rank // 172 for row in rows)
            assert [row.loss > 0 for row in rows] == [row.name.endswith("down_proj") for row in rows]
    assert 0.99 * 0.2 <= narrow.plan.kept <= 0.2


def test_the_folder_is_what_the_plan_says(narrow, tmp_path):
    contents = {layer.name: layer for layer in eckart.show(narrow.out).layers}
    for row in narrow.plan.layers:
        if row.structure == "neurons":
            shown = contents[row.name]
            assert (shown.structure, shown.numbers, shown.dense_numbers) == ("neurons", row.numbers, row.dense_numbers)
    model, dense = load(narrow.out), load(narrow.out).dequantize()
    expected = logits(model)
    torch.testing.assert_close(logits(dense), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    assert narrow.checked.difference <= narrow.checked.tolerance


def test_a_plan_has_the_same_choice(narrow, demo, quick):
    planned = eckart.plan(demo, keep=0.2, **quick("eckart-mixed", neurons="always"))
    assert [(row.name, row.structure, row.rank, row.numbers, row.nbytes) for row in planned.layers] == [
        (row.name, row.structure, row.rank, row.numbers, row.nbytes) for row in narrow.plan.layers
    ]
    assert planned.parameters_after == narrow.plan.parameters_after
    assert planned.loss < eckart.plan(demo, keep=0.2, **quick("eckart-mixed")).loss


def test_at_moderate_budgets_maps_lose_less_and_nothing_changes(demo, quick):
    with_neurons = eckart.plan(demo, keep=0.7, **quick("eckart-mixed", neurons="always"))
    assert with_neurons == eckart.plan(demo, keep=0.7, **quick("eckart-mixed"))


def test_the_predicted_loss_of_fewer_units_is_that_of_the_layer_that_reads_them(demo, text, tmp_path):
    """In the metric of the maps it competes with: tr(B E G E^T), E the change of W against zeros for units removed."""
    request = Request(demo, "eckart-mixed", 0.2, text, 8, 64, 0, {"neurons": "always"})
    job = open_job(request, silent)
    store = statistics_store(job, tmp_path)
    collect(job, store, Store(tmp_path / "boundaries"), silent)
    known, layers = Known(job, store), layers_of(job)
    sets = narrower_sets(job, layers, known)
    assert [layer.name for layer, _ in sets] == [f"model.layers.{i}.mlp.down_proj" for i in range(5)]
    (layer, found), ((_, weight),) = sets[1], weights(job, [sets[1][0]])
    metric = known.metric(layer, weight)
    assert len(found.options) == 16
    for option in (found.options[0], found.options[7]):
        damped = metric.inputs + metric.inputs.diagonal().mean() * torch.eye(172)
        kept = (metric.inputs @ damped.inverse()).diagonal().topk(option.rank).indices
        change = weight.double()
        fitted = torch.linalg.solve(metric.inputs[kept][:, kept], (change @ metric.inputs)[:, kept], left=False)
        change = change.index_add(1, kept, -fitted)
        error = float((metric.outputs @ change @ metric.inputs @ change.mT).trace())
        assert option.loss == pytest.approx(error * known.scale(), rel=1e-6)


def planted(folder: Path, demo: Path) -> Path:
    """Write the demonstration model with sums of two Kronecker products as the matrices of its blocks."""
    shutil.copytree(demo, folder)
    model, family = load(demo), kronecker_family()
    for i, module in enumerate(m for m in model.model.layers.modules() if isinstance(m, nn.Linear)):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            shape = module.out_features, module.in_features
            module.weight.data = family.example(shape, 2, torch.device("cpu")).dense() / shape[1] ** 0.5 / 2
    model.save_pretrained(folder)
    return folder


def test_kronecker_products_are_found_where_there_are_some(demo, quick, tmp_path):
    model = planted(tmp_path / "model", demo)
    apart = eckart.plan(model, keep=0.3, **quick("eckart-mixed"))
    outcome = eckart.compress(model, tmp_path / "out", keep=0.3, **quick("eckart-mixed", kronecker=True))
    rows = [row for row in outcome.plan.layers if row.structure == "kronecker"]
    assert len(rows) > 25
    assert outcome.plan.loss < 0.5 * apart.loss
    assert 0.99 * 0.3 <= outcome.plan.kept <= 0.3
    contents = {layer.name: layer for layer in eckart.show(outcome.out).layers}
    for row in rows:
        assert (contents[row.name].numbers, contents[row.name].nbytes) == (row.numbers, row.nbytes)
    loaded = load(outcome.out)
    assert logits(loaded).isfinite().all()
    torch.testing.assert_close(logits(load(outcome.out).dequantize()), logits(loaded), atol=1e-4, rtol=1e-4)
