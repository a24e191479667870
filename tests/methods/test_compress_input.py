"""Bad input: one sentence that says what came, what was expected and what to do; nothing is written or lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import eckart
from eckart.errors import EckartError
from eckart.methods.compress import job as jobs
from eckart.methods.compress import pipeline


@pytest.fixture
def refused(tmp_path, demo, text, cache):
    """Checks that a call is refused in one sentence by `compress` and by `plan`, and that nothing was written."""
    work = tmp_path / "work"
    work.mkdir()

    def check(message: str, model: Path = demo, **arguments) -> None:
        given = {"method": "svd-llm", "calibration": text, "samples": 4, "length": 32, **arguments}
        for call in (lambda: eckart.compress(model, work / "out", **given), lambda: eckart.plan(model, **given)):
            with pytest.raises(EckartError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)
            assert list(work.iterdir()) == []
            assert not cache.exists() or not any(cache.iterdir())

    return check


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.5, float("nan"), float("inf"), "0.6", True])
def test_keep(keep, refused):
    refused(r"keep is .*\(0, 1\], got ", keep=keep)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("svdllm", "unknown method 'svdllm'; did you mean 'svd-llm'"),
        ("Eckart", "unknown method 'Eckart'; did you mean 'eckart'"),
        ("magic", "unknown method 'magic'; there are svd, fwsvd"),
        ("", "unknown method ''; there are svd"),
        (None, "unknown method None; there are svd"),
    ],
)
def test_method(method, message, refused):
    refused(message, method=method)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("eckart", {"ancor": 0.5}, "eckart has no setting 'ancor'; did you mean 'anchor'"),
        ("svd", {"anchor": 0.5}, "svd has no setting 'anchor'; there are allocation"),
        ("svd", {"metric": 3}, "svd has no setting 'metric'"),
        ("eckart", {"anchor": 1.5}, r"anchor must lie in \[0, 1\], got 1.5"),
        ("eckart", {"anchor": float("nan")}, "anchor of eckart must be a finite number, got nan"),
        ("eckart", {"anchor": "much"}, "anchor of eckart must be a finite number, got 'much'"),
        ("eckart", {"anchor": None}, "anchor of eckart must be a finite number, got None"),
        ("eckart", {"bias": "yes"}, "bias of eckart must be true or false, got 'yes'"),
        ("svd", {"round_to": 0}, "round_to must be at least 1, got 0"),
        ("svd", {"round_to": 2.5}, "round_to of svd must be a whole number, got 2.5"),
        ("svd", {"round_to": True}, "round_to of svd must be a whole number, got True"),
        ("svd", {"heal": -1}, "heal is a number of epochs and must not be negative, got -1"),
        ("svd", {"heal_rate": 0}, "heal_rate must be positive, got 0"),
        ("svd", {"storage": "pivot"}, "storage of svd must be one of lowrank, pivoted, got 'pivot'"),
        ("svd", {"allocation": "fair"}, "allocation of svd must be one of uniform, .*, got 'fair'"),
        ("svd", {"allocation": "threshold"}, "allocation=threshold needs a method that scores spectra, such as welore"),
        ("kfac", {"labels": "true"}, "labels of kfac must be one of sampled, observed, got 'true'"),
        ("asvd", {"alpha": float("inf")}, "alpha of asvd must be a finite number, got inf"),
        ("svd", {"gamma": float("nan")}, "gamma of svd must be a finite number, got nan"),
    ],
)
def test_settings(method, settings, message, refused):
    refused(message, method=method, settings=settings)


def test_whole_numbers_are_numbers(demo):
    assert eckart.plan(demo, method="svd", keep=0.7, settings={"gamma": 1, "heal_rate": 1}).kept <= 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"samples": -3}, "samples must be at least 1, got -3"),
        ({"samples": 2.5}, "samples must be a whole number, got 2.5"),
        ({"length": 0}, "length must be at least 2, got 0"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"length": 513}, "length 513 exceeds the model's context of 512 tokens; give at most that"),
        ({"samples": 10**6}, r"1000000 samples of 32 need 32000000; use --samples \d+ or a longer text"),
        ({"seed": "lucky"}, "seed must be a whole number, got 'lucky'"),
        ({"seed": -1}, "seed must be at least 0 and less than 4294967296, got -1"),
        ({"seed": 1 << 64}, "seed must be at least 0 and less than"),
    ],
)
def test_numbers(arguments, message, refused):
    refused(message, **arguments)


def test_texts(refused, tmp_path):
    refused("there is no text file .*nothing", calibration=tmp_path / "nothing")
    refused("there is no text file", calibration=tmp_path)
    (tmp_path / "short.txt").write_text("Once upon a time")
    refused(r"has \d+ tokens, but 4 samples of 32 need 128; give a longer text", calibration=tmp_path / "short.txt")
    (tmp_path / "empty.txt").write_text("\n")
    refused("holds no text", calibration=tmp_path / "empty.txt")


@pytest.mark.parametrize("method", [m for m in eckart.METHODS if m not in ("svd", "welore", "rtn")])
def test_methods_that_need_a_text(method, refused):
    refused(f"{method} needs a calibration text; give one with --calibration FILE", method=method, calibration=None)


@pytest.mark.parametrize("settings", [{"heal": 1}, {"allocation": "calibrated"}, {"allocation": "sensitivity"}])
def test_settings_that_need_a_text(settings, refused):
    refused("svd needs a calibration text", method="svd", calibration=None, settings=settings)


def test_models(refused, tmp_path, demo):
    refused("there is no model folder .*nowhere", model=tmp_path / "nowhere")
    folder = Path(shutil.copytree(demo, tmp_path / "model"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-5000])
    refused("is damaged or incomplete", model=folder)
    (folder / "model.safetensors").write_bytes(content)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(
        r"model\.layers\.1\.mlp\.up_proj\.weight in .* holds 1 NaN or Inf values; the model is broken", model=folder
    )
    (folder / "config.json").write_text("{")
    refused("cannot be read as JSON", model=folder)


def test_a_model_without_tokenizer(refused, tmp_path, demo):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(demo / name, folder)
    refused("has no usable tokenizer", model=folder)


def test_a_compressed_model(compressed, refused):
    refused(r"already compressed .*; densify it first \(eckart densify\)", model=compressed("svd").out)


def test_a_budget_that_cannot_be_met(refused):
    refused(
        r"keep 0\.05 of 260,032 parameters cannot be met: 33,472 parameters lie outside .* at their smallest; "
        r"ask for more than 0\.\d+, or let embeddings be compressed as well with --set embeddings=true",
        keep=0.05,
        method="svd",
    )


def test_the_reachable_share_that_is_named_is_reachable(demo):
    with pytest.raises(EckartError) as caught:
        eckart.plan(demo, method="svd", keep=0.01, settings={"embeddings": True})
    message = str(caught.value)
    assert "embeddings=true" not in message
    least = float(message.rpartition("more than ")[2])
    assert eckart.plan(demo, method="svd", keep=least + 0.001, settings={"embeddings": True}).kept > 0.01


def test_observed_labels_need_a_decoder(tmp_path, refused):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    hf.BertForMaskedLM(hf.BertConfig(vocab_size=13, **sizes)).save_pretrained(tmp_path / "model")
    hf.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    refused("observed labels need a model that predicts the next token", model=tmp_path / "model", method="kfac")


def test_outputs(tmp_path, demo):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for out, message in (
        ("full", "already holds something; give a new or an empty one"),
        ("file", "is a file; give the path of a folder that does not exist yet"),
        ("file/out", "cannot be written to; give a folder elsewhere"),
    ):
        with pytest.raises(EckartError, match=message):
            eckart.compress(demo, tmp_path / out, method="svd", keep=0.7)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["file", "full", "full/thesis.txt"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_an_output_nobody_can_write(demo):
    with pytest.raises(EckartError, match=r"/proc.* cannot be written to|cannot write beside /proc.*; choose another"):
        eckart.compress(demo, "/proc/nothing/out", method="svd", keep=0.7)


def test_a_failure_behind_the_first_block_keeps_it_and_one_before_leaves_nothing(demo, quick, tmp_path, monkeypatch):
    work = tmp_path / "work"
    for stop, left in ((0, 0), (2, 1)):

        def fail(self, index, pairs, stop=stop, block=pipeline.Sweep._block):
            if index == stop:
                raise EckartError("the disk is full")
            block(self, index, pairs)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.Sweep, "_block", fail)
            with pytest.raises(EckartError, match="the disk is full"):
                eckart.compress(demo, work / "out", keep=0.7, **quick("svd-llm"))
        assert len(list(work.iterdir())) == left
    eckart.compress(demo, work / "out", keep=0.7, **quick("svd-llm"))
    assert [path.name for path in work.iterdir()] == ["out"]


def stages_of(call) -> list[str]:
    stages: dict[str, None] = {}
    call(progress=lambda stage, done, total: stages.setdefault(stage) if total > done else None)
    return list(stages)


def test_statistics_are_shared_by_runs_with_the_same_text(demo, quick, tmp_path, cache):
    first = stages_of(lambda **k: eckart.compress(demo, tmp_path / "a", keep=0.7, **quick("eckart"), **k))
    assert {"forward", "objective", "backward"} <= set(first)
    assert len(list(cache.glob("statistics-*"))) == 1
    other_budget = stages_of(lambda **k: eckart.compress(demo, tmp_path / "b", keep=0.5, **quick("eckart"), **k))
    assert not {"forward", "objective", "backward"} & set(other_budget)
    assert "forward" not in stages_of(lambda **k: eckart.plan(demo, keep=0.7, **quick("svd-llm"), **k))
    assert not any(path.name.startswith("boundary") for path in cache.rglob("*"))
    observed = stages_of(lambda **k: eckart.plan(demo, keep=0.7, **quick("kfac"), **k))
    assert "backward" in observed  # other labels
    for change in ({"samples": 5}, {"length": 40}, {"seed": 1}):
        again = stages_of(lambda change=change, **k: eckart.plan(demo, keep=0.7, **{**quick("svd-llm"), **change}, **k))
        assert "forward" in again, change
    assert len(list(cache.glob("statistics-*"))) == 4


def test_probes_are_measured_once(demo, quick, tmp_path):
    arguments = {**quick("svd", allocation="calibrated"), "samples": 2, "length": 16}
    assert "probe" in stages_of(lambda **k: eckart.plan(demo, keep=0.7, **arguments, **k))
    assert "probe" not in stages_of(lambda **k: eckart.plan(demo, keep=0.5, **arguments, **k))


def test_without_cache_none_is_left(demo, quick, tmp_path, cache):
    for _ in range(2):
        run = stages_of(lambda **k: eckart.plan(demo, keep=0.7, cache=False, **quick("svd-llm"), **k))
        assert "forward" in run
    eckart.compress(demo, tmp_path / "out", keep=0.7, cache=False, **quick("svd-llm"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not cache.exists()


def test_the_oldest_statistics_make_room(demo, quick, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(jobs, "CACHE_LIMIT", 1)
    for seed in (1, 2):
        eckart.compress(demo, tmp_path / f"out-{seed}", keep=0.7, seed=seed, **quick("svd-llm"))
        assert len(list(cache.glob("statistics-*"))) == 1


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100])
def test_a_damaged_cache_is_said_to_be_damaged(damage, demo, quick, cache):
    eckart.plan(demo, keep=0.7, **quick("svd-llm"))
    path = next(cache.rglob("inputs-0002.safetensors"))
    path.write_bytes(damage)
    with pytest.raises(EckartError, match=r"inputs-0002\.safetensors is damaged .*; delete its folder"):
        eckart.plan(demo, keep=0.7, **quick("svd-llm"))


def test_the_report_has_no_paths(demo, quick, tmp_path):
    outcome = eckart.compress(demo, tmp_path / "out", keep=0.7, **quick("svd-llm"))
    for name in ("eckart.json", "README.md", "config.json"):
        assert str(tmp_path) not in (outcome.out / name).read_text()
        assert str(demo) not in (outcome.out / name).read_text()
    assert json.loads((outcome.out / "eckart.json").read_text())["settings"]["model"] == "stories260k"
    assert torch.isfinite(torch.tensor(outcome.plan.loss))
