"""A compression holds its own output to what it promised before it gives it a name."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import eckart
from eckart.errors import EckartError
from eckart.files import writing
from eckart.files.shards import Source
from eckart.hosts.timing import LEAST_ROUNDS, medians
from eckart.methods.compress import check

REAL_PROCESS = check.fresh_process  # what the tests of this folder replace
PIVOTED = {"method": "svd", "settings": {"storage": "pivoted"}, "keep": 0.7}
DOWN = "model.layers.1.mlp.down_proj"


def test_a_fresh_process_finds_what_was_promised(demo, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "fresh_process", REAL_PROCESS)
    outcome = eckart.compress(demo, tmp_path / "out", keep=0.7, **quick("eckart"))
    found = outcome.checked
    assert (found.what, found.tokens) == ("logits", 3 * 48)
    assert found.difference <= 1e-5
    assert found.nbytes == sum(t.nbytes for t in load_file(outcome.out / "model.safetensors").values())
    assert set(found.speeds) == {"reading", "generating"}
    assert all(speed.dense > 0 < speed.compressed for speed in found.speeds.values())
    assert json.loads(json.dumps(outcome.as_dict()))["checked"]["nbytes"] == found.nbytes
    report = json.loads((outcome.out / "eckart.json").read_text())
    assert report["checked"] == {"what": "logits", "tolerance": found.tolerance, "tokens": found.tokens}
    assert "a fresh process loads this folder" in (outcome.out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]


def test_without_a_check_nothing_is_claimed(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "fresh_process", lambda order: pytest.fail("a process was started"))
    outcome = eckart.compress(demo, tmp_path / "out", check=False, **PIVOTED)
    assert outcome.checked is None
    assert json.loads((outcome.out / "eckart.json").read_text())["checked"] is None
    assert "fresh process" not in (outcome.out / "README.md").read_text()


def changed(change):
    """A writer that stores something else than it was given: `change` maps name and tensor to what is written."""
    write = writing.write_shards

    def wrong(folder, sources, progress):
        out = {}
        for name, source in sources.items():
            for key, tensor in change(name, source.read()):
                out[key] = Source(tensor.nbytes, lambda tensor=tensor: tensor)
        write(folder, out, progress)

    return wrong


def lost(name, tensor):
    return [] if name == f"{DOWN}.basis.weight" else [(name, tensor)]


def added(name, tensor):
    return [(name, tensor), *([("model.extra", torch.ones(4))] if name == "model.norm.weight" else [])]


def at(wanted, function):
    return lambda name, tensor: [(name, function(tensor) if name == wanted else tensor)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at(f"{DOWN}.basis.weight", lambda t: 2 * t), "logits differ from those of the compressed model in memory by"),
        (at(f"{DOWN}.coefficients.weight", torch.zeros_like), "logits differ from those"),
        (at(f"{DOWN}.order", lambda t: t.flip(0)), "logits differ from those"),
        (at("model.norm.weight", lambda t: t * torch.nan), "logits differ from those .* by nan of the largest"),
        (at("model.norm.weight", lambda t: t.double()), r"bytes in its files, where the plan says [\d,]+;"),
        (at(f"{DOWN}.order", lambda t: t.long()), "bytes in its files, where the plan says"),
        (lost, "numbers in its files, where the plan says"),
        (added, "numbers in its files, where the plan says"),
        (
            lambda name, tensor: [(name.replace("model.norm.weight", "model.gone.weight"), tensor)],
            "it loads with missing tensors, for instance model.norm.weight",
        ),
        (at(f"{DOWN}.order", torch.zeros_like), "a fresh process cannot load it .*the tensors of layer .* are corrupt"),
    ],
    ids=["scaled", "zeroed", "reordered", "nan", "wider", "wide-index", "lost", "added", "renamed", "corrupt-index"],
)
def test_a_wrong_output_is_refused_and_deleted(change, message, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_shards", changed(change))
    if "cannot load" in message:
        monkeypatch.setattr(check, "fresh_process", REAL_PROCESS)
    with pytest.raises(EckartError, match=message) as caught:
        eckart.compress(demo, tmp_path / "out", **PIVOTED)
    assert str(caught.value).startswith("the compressed folder failed its own check and was deleted: ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_larger_than_it_was_is_refused(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(
        writing.LayerRecord, "of", lambda *args, of=writing.LayerRecord.of, **rest: larger(of(*args, **rest))
    )
    with pytest.raises(EckartError, match=r"takes [\d,]+ bytes, more than the [\d,]+ it took before"):
        eckart.compress(demo, tmp_path / "out", **PIVOTED)
    assert list(tmp_path.iterdir()) == []


def larger(record):
    return writing.LayerRecord(**{name: getattr(record, name) for name in record.__slots__} | {"nbytes": 1 << 30})


def test_a_killed_check_leaves_the_work_to_be_continued(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "fresh_process", REAL_PROCESS)
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nkill -{int(signal.SIGKILL)} $$\n")
    os.chmod(script, 0o700)
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        patch.setattr(check.sys, "executable", str(script))
        with pytest.raises(
            EckartError, match=r"ended by signal 9, .* kept: run the same command again, or with --no-check"
        ):
            eckart.compress(demo, work / "out", **PIVOTED)
    assert [path.name.startswith(".out.eckart-") for path in work.iterdir()] == [True]
    steps = []
    eckart.compress(demo, work / "out", check=False, progress=lambda *step: steps.append(step), **PIVOTED)
    assert [step[1] for step in steps if step[0] == "compress"] == [5]
    assert [path.name for path in work.iterdir()] == ["out"]


def test_medians_take_turns_and_warm_up():
    seen = []
    found = medians({name: lambda name=name: seen.append(name) for name in "ab"}, seconds=0.0)
    assert set(found) == {"a", "b"}
    assert seen == ["a", "b"] * (LEAST_ROUNDS + 1)
