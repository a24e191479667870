"""Fine-tuning from data to a saved adapter: what it learns, that it resumes, and what it refuses."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

import eckart
from eckart.errors import EckartError
from eckart.methods.adapt import tune as tuning
from eckart.methods.adapt.tasks import Examples

DEMO = Path(eckart.__file__).parent / "demo"
MODEL, TEXT = DEMO / "stories260k", DEMO / "train.txt"
QUICK = {"steps": 12, "batch": 4, "length": 32, "rate": 3e-3}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sentences whose label is a word in them."""
    lines = [
        {"sentence": f"the {w} ran to the {o}", "kind": w} for o in ("house", "tree", "sea") for w in ("dog", "cat")
    ]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines * 12)).encode()))
    return path


def test_a_fine_tune_lowers_the_loss_and_its_adapter_loads(tmp_path: Path):
    text = tmp_path / "capitals.txt"
    text.write_text(TEXT.read_text().upper()[:40_000])  # what the model does not know yet
    done = eckart.tune(MODEL, text, tmp_path / "out", method="lora", settings={"rank": 4}, **QUICK)
    assert done.after["loss"] < done.before["loss"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["after"] == done.after
    assert (
        done.trained
        == report["trained"]
        == 4 * sum(sum(layer.shape) for name, layer in _linear(MODEL).items() if "layers" in name)
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    eckart.load_adapter(model, tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(MODEL)(ids).logits)
    assert {p.name for p in tmp_path.iterdir()} == {"capitals.txt", "out"}


def _linear(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dora", {"rank": 2}),
        ("sparselora", {"rank": 2, "dense": 3, "outputs": "sparse", "units": 0.5}),
        ("sqft", {"rank": 4}),
        ("flylora", {"rank": 4, "kept": 2}),
    ],
)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, object]
):
    options = {"method": method, "settings": settings, **QUICK}
    monkeypatch.setattr(tuning, "Course", lambda *args: _Course(*args, save_every=4))
    eckart.tune(MODEL, TEXT, tmp_path / "whole", **options)

    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 9:
            raise StoppedError

    with pytest.raises(StoppedError):
        eckart.tune(MODEL, TEXT, tmp_path / "parts", progress=stop, **options)
    assert not (tmp_path / "parts").exists()
    assert any(p.name.startswith(".parts.eckart-") for p in tmp_path.iterdir())
    seen = []
    eckart.tune(MODEL, TEXT, tmp_path / "parts", progress=lambda stage, done, total: seen.append(done), **options)
    assert min(seen) == 8
    for name in ("adapter.safetensors", "eckart_adapter.json", "report.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


_Course = tuning.Course


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=len(tokenizer)
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classification_trains_its_head_and_keeps_it(tmp_path: Path, rows: Path, encoder: Path):
    folder, tokenizer = encoder, PreTrainedTokenizerFast.from_pretrained(MODEL)
    done = eckart.tune(
        folder, rows, tmp_path / "out", text_field="sentence", label_field="kind", steps=60, batch=12, length=32,
        rate=1e-2, settings={"rank": 4},
    )  # fmt: skip
    assert done.after["accuracy"] == 1.0
    assert done.after["loss"] < done.before["loss"]
    assert done.calibration.keys() == {"temperature", "error", "scaled"}
    assert 0 <= done.calibration["error"] <= 1
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    eckart.load_adapter(model, tmp_path / "out")
    ids = [tokenizer(f"the {word} ran to the sea", return_tensors="pt")["input_ids"] for word in ("cat", "dog")]
    with torch.no_grad():
        assert [int(model.eval()(one).logits.argmax()) for one in ids] == [0, 1]


def test_a_table_sorted_by_label_is_held_out_from_all_of_it(tmp_path: Path, encoder: Path):
    lines = [{"sentence": f"the {w} ran to the sea", "kind": w} for w in ["dog"] * 64 + ["cat"] * 6]
    path = tmp_path / "sorted.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    done = eckart.tune(
        encoder, path, tmp_path / "out", text_field="sentence", label_field="kind", steps=12, batch=12, length=32,
        rate=1e-2, settings={"rank": 4},
    )  # fmt: skip
    assert done.after["accuracy"] > 0.5  # the last tenth has one class, which would then be in no example that trains


def test_labelled_rows_are_drawn_and_windows_of_a_text_are_not():
    rows = torch.stack((torch.arange(200) // 100, torch.arange(200)), 1)
    train, held_out = Examples(rows, ("a", "b")).split(0)
    assert len(held_out.rows) == 20
    assert set(held_out.rows[:, 0].tolist()) == set(train.rows[:64, 0].tolist()) == {0, 1}
    assert sorted([*train.rows[:, 1].tolist(), *held_out.rows[:, 1].tolist()]) == list(range(200))
    assert held_out.rows.equal(Examples(rows, ("a", "b")).split(0)[1].rows)
    assert not held_out.rows.equal(Examples(rows, ("a", "b")).split(1)[1].rows)
    train, held_out = Examples(rows).split(0)
    assert torch.cat((train.rows, held_out.rows)).equal(rows)
    drawn = Examples(rows).drawn(64, 0)
    assert len(drawn[:, 1].unique()) == 64
    assert set(drawn[:, 0].tolist()) == {0, 1}
    assert len(Examples(rows).drawn(999, 0)) == 200


LABELLED = {
    "text_field": "sentence", "label_field": "kind", "batch": 12, "length": 32, "probe_rate": 3e-2,
    "settings": {"rank": 2},
}  # fmt: skip


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def test_a_probe_trains_the_head_alone_before_the_adapter(tmp_path: Path, rows: Path, encoder: Path):
    """At a rate near zero what comes after it changes nothing: all that is learned is the head's."""
    stages: list[str] = []
    for probe, out in ((0, "plain"), (30, "probed")):
        eckart.tune(
            encoder, rows, tmp_path / out, steps=2, rate=1e-9, probe=probe, **LABELLED,
            progress=lambda stage, done, total: stages.append(stage) if stage not in stages[-1:] else None,
        )  # fmt: skip
    assert stages == ["train", "probe", "train"]
    plain, probed = saved(tmp_path / "plain"), saved(tmp_path / "probed")
    for name, tensor in probed.items():
        assert (tensor - plain[name]).abs().max() < 1e-7 or name.startswith("classifier.")
    assert (probed["classifier.weight"] - plain["classifier.weight"]).abs().max() > 1e-2
    report = json.loads((tmp_path / "probed/report.json").read_text())
    assert report["probe"] == 30
    assert report["after"]["loss"] < report["before"]["loss"]


def test_starts_from_gradients_know_the_probed_head(tmp_path: Path, rows: Path, encoder: Path):
    for probe, out in ((0, "plain"), (10, "probed")):
        eckart.tune(encoder, rows, tmp_path / out, method="lora-sb", steps=1, rate=1e-9, probe=probe, **LABELLED)
    plain, probed = saved(tmp_path / "plain"), saved(tmp_path / "probed")
    layers = [name for name in plain if not name.startswith("classifier.")]
    assert any((plain[name] - probed[name]).abs().max() > 1e-3 for name in layers)


@pytest.mark.parametrize("stopped", ["probe", "train"])
def test_both_stages_of_a_stopped_run_go_on(
    stopped: str, tmp_path: Path, rows: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {**LABELLED, "steps": 8, "probe": 8, "rate": 1e-3}
    monkeypatch.setattr(tuning, "Course", lambda *args: _Course(*args, save_every=3))
    eckart.tune(encoder, rows, tmp_path / "whole", **options)

    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == stopped and done == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        eckart.tune(encoder, rows, tmp_path / "parts", progress=stop, **options)
    seen: dict[str, int] = {}
    eckart.tune(
        encoder, rows, tmp_path / "parts", progress=lambda stage, done, total: seen.setdefault(stage, done), **options
    )
    assert seen == ({"probe": 3, "train": 0} if stopped == "probe" else {"probe": 8, "train": 3})
    for name in ("adapter.safetensors", "eckart_adapter.json", "report.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_sweep_finds_a_better_rate_than_one_that_is_far_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = tmp_path / "capitals.txt"
    text.write_text(TEXT.read_text().upper()[:40_000])
    options = {**QUICK, "settings": {"rank": 2}, "steps": 30}
    found = eckart.tune(MODEL, text, tmp_path / "auto", **{**options, "rate": "auto"})
    assert found.rate in [1e-3 * factor for factor in (0.1, 0.3, 1.0, 3.0, 10.0)]
    far_off = eckart.tune(MODEL, text, tmp_path / "far", **{**options, "rate": 1e-5})
    assert found.after["loss"] < far_off.after["loss"]
    again = eckart.tune(MODEL, text, tmp_path / "again", **{**options, "rate": found.rate})
    assert again.after == found.after  # the sweep leaves the start as it was
    monkeypatch.setattr(tuning, "GRID", (1e30,))
    with pytest.raises(EckartError, match="diverges at every rate tried"):
        eckart.tune(MODEL, text, tmp_path / "none", **{**options, "rate": "auto"})


def test_the_curvature_gives_a_rate_and_leaves_the_start(tmp_path: Path):
    text = tmp_path / "capitals.txt"
    text.write_text(TEXT.read_text().upper()[:40_000])
    options = {**QUICK, "settings": {"rank": 2}}
    found = eckart.tune(MODEL, text, tmp_path / "found", **{**options, "rate": "curvature"})
    assert 1e-5 < found.rate < 1
    again = eckart.tune(MODEL, text, tmp_path / "again", **{**options, "rate": found.rate})
    assert again.after == found.after
    with pytest.raises(EckartError, match="'auto' or 'curvature', got 'best'"):
        eckart.tune(MODEL, text, tmp_path / "best", **{**options, "rate": "best"})


def test_peft_s_format_comes_out_if_asked_for(tmp_path: Path):
    eckart.tune(MODEL, TEXT, tmp_path / "out", format="peft", settings={"rank": 2}, **QUICK)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "report.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "lorra"}, "unknown method 'lorra'"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rate": -1.0}, "rate must be positive, got -1.0"),
        ({"length": 10**6}, "too few for one window of 1000000"),
        ({"label_field": "kind"}, "is not JSON"),
        ({"probe": 5}, "probe trains the head of a classification, and texts have none"),
        ({"label_field": "kind", "probe": 3, "probe_rate": 0.0}, "probe_rate must be positive and finite, got 0.0"),
        ({"after": "somewhere"}, "lora builds on no earlier adapter; leave after out, or take incremental"),
        ({"after": "nowhere", "method": "incremental", "label_field": "kind"}, "leave the label field or after out"),
        ({"probe": -5}, "probe must not be negative, got -5"),
        ({"rate": 1e30, "steps": 40}, "use a smaller learning rate"),
        ({"method": "soka", "format": "peft", "steps": 10**9}, "PEFT has no type for Plus of a Kronecker"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path: Path, options: dict[str, object], sentence: str):
    data = tmp_path / "data.jsonl"
    data.write_text(TEXT.read_text() if "label_field" in options else "")
    given = data if "label_field" in options else TEXT
    with pytest.raises(EckartError, match=sentence):
        eckart.tune(MODEL, given, tmp_path / "out", **{**QUICK, **options})
    assert not (tmp_path / "out").exists()


def test_fields_and_labels_that_are_not_there_are_named(tmp_path: Path, rows: Path):
    with pytest.raises(EckartError, match="has no field 'text'; it has sentence, kind"):
        eckart.tune(MODEL, rows, tmp_path / "out", label_field="kind", **QUICK)
    other = tmp_path / "other.tsv"
    other.write_text("sentence\tkind\nthe cow ran\tcow\n")
    with pytest.raises(EckartError, match="has the label 'cow', which the training data does not have"):
        eckart.tune(MODEL, rows, tmp_path / "out", validation=other, text_field="sentence", label_field="kind", **QUICK)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(EckartError, match=r"there is no model folder .*nowhere; give the path of a folder"):
        eckart.tune(tmp_path / "nowhere", TEXT, tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_later_task_builds_on_an_earlier_one_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"method": "incremental", "settings": {"rank": 4, "later": 2}, **QUICK}
    first = eckart.tune(MODEL, TEXT, tmp_path / "first", **options)
    capitals = tmp_path / "capitals.txt"
    capitals.write_text(TEXT.read_text().upper()[:40_000])
    with pytest.raises(EckartError, match="lora builds on no earlier adapter"):
        eckart.tune(MODEL, capitals, tmp_path / "lora", after=tmp_path / "first", **QUICK)
    second = eckart.tune(MODEL, capitals, tmp_path / "second", after=tmp_path / "first", **options)
    assert second.after["loss"] < second.before["loss"]
    sizes = [layer.shape for name, layer in _linear(MODEL).items() if "layers" in name]
    assert first.trained == sum(4 * (m + n) + 4 for m, n in sizes)
    assert second.trained == sum(2 * (m + n) + 4 + 2 for m, n in sizes)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for name in ("first", "second"):
        eckart.load_adapter(model, tmp_path / name, name)
    assert eckart.adapters(model).names == ["first", "second"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_publish", killed)
    with pytest.raises(KeyboardInterrupt):
        eckart.tune(MODEL, capitals, tmp_path / "again", after=tmp_path / "first", **options)
    monkeypatch.undo()
    eckart.tune(MODEL, capitals, tmp_path / "again", after=tmp_path / "first", **options)
    for path in (tmp_path / "second").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
