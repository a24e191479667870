"""The command line through its own door: what is printed where, exit codes, and that help costs nothing."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from eckart.cli.main import app
from eckart.cli.progress import Bars
from eckart.cli.settings import parse_settings
from eckart.errors import EckartError
from eckart.methods import reload
from eckart.methods.compress import check
from eckart.methods.compress.table import METHODS

DEMO = Path(str(files("eckart"))) / "demo"
VERBS = (
    "compress", "adapt", "adapters", "eval", "methods", "show", "densify", "slice", "delta", "restore", "demo",
)  # fmt: skip
RUN = ["compress", "MODEL", "--keep", "0.5", "--out", "x"]
BYTES = ["compress", "MODEL", "--method", "svd", "--out", "x", "--bytes"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama with the demonstration's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **SMALL)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "stories260k" / name, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "stories.txt"
    path.write_text((DEMO / "valid.txt").read_text()[:6000])
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(check, "fresh_process", reload.run)  # a process of its own takes seconds to import torch


def eckart(*args: str | Path, code: int = 0):
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def small(model: Path, text: Path, out: Path, *more: str, code: int = 0):
    """Compress the tiny model in a second."""
    arguments = ("--keep", "0.7", "--calibration", text, "--samples", "8", "--length", "32", "--out", out)
    return eckart("compress", model, *arguments, *more, code=code)


HELP = """
import sys, time
from eckart.cli.main import app
for verb in ([], *([name] for name in sys.argv[1:])):
    app([*verb, "--help"], standalone_mode=False)
app(["--version"], standalone_mode=False)
sys.argv = ["eckart", "compress", "no-such-folder", "--keep", "0.5", "--out", "x"]
try:
    app()
except SystemExit as end:
    assert end.code == 1
heavy = {"torch", "transformers", "scipy", "safetensors"} & set(sys.modules)
print(time.process_time(), sorted(heavy), file=sys.stderr)  # processor time: other programs do not count
"""


def test_help_and_early_errors_import_nothing_heavy() -> None:
    run = subprocess.run([sys.executable, "-c", HELP, *VERBS], capture_output=True, text=True, check=True)
    error, measured = run.stderr.splitlines()
    assert error.startswith("eckart: there is no model folder no-such-folder")
    seconds, _, imported = measured.partition(" ")
    assert imported == "[]"
    assert float(seconds) < 1.0
    for verb in VERBS:
        assert f"eckart {verb}" in run.stdout or f" {verb} [" in run.stdout


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert eckart("--version").stdout == f"eckart {version('eckart')}\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["compress", "none", "--keep", "0.5", "--out", "x"], 1, "there is no model folder none"),
        (["compress", "MODEL", "--keep", "0", "--out", "x"], 1, "must lie in (0, 1], got 0"),
        (["compress", "MODEL", "--keep", "1.01", "--out", "x"], 1, "must lie in (0, 1], got 1.01"),
        (["compress", "MODEL", "--keep", "half", "--out", "x"], 2, "Invalid value for '--keep'"),
        ([*RUN, "--bytes", "1MB"], 1, "keep and bytes are given, but a run has one budget; give one of keep, bytes"),
        ([*BYTES, "2XB"], 1, "bytes must be a size such as 20MB, 1.5GiB or 800000, got '2XB'"),
        ([*BYTES, "10B"], 1, "bytes cannot be met: "),
        (["compress", "MODEL", "--out", "x", "--latency", "0.7"], 1, "written as 0.7x; got '0.7'"),
        (["compress", "MODEL", "--out", "x", "--flops", "1.5x"], 1, "at most 1, written as 0.7x; got '1.5x'"),
        (["compress", "MODEL", "--method", "rtn", "--keep", "0.5", "--out", "x"], 1, "so keep must be 1, got 0.5"),
        (["compress", "MODEL", "--keep", "0.5"], 2, "give a folder to write, or --plan"),
        (["compress", "MODEL", "--keep", "0.5", "--out", "MODEL"], 1, "already exists; give a new or an empty folder"),
        ([*RUN, "--calibration", "none.txt"], 1, "no text file none.txt"),
        ([*RUN, "--method", "svd-lm"], 1, "did you mean 'svd-llm'?"),
        ([*RUN, "--set", "ancor=1"], 1, "did you mean 'anchor'?"),
        ([*RUN, "--set", "anchor=much"], 1, "anchor of eckart must be a number"),
        (RUN, 1, "needs a calibration text; give one with --calibration"),
        (["compress", "EMPTY", "--keep", "0.5", "--out", "x"], 1, "has no config.json"),
        (["eval", "MODEL"], 2, "give one of --text (decoders), --pairs"),
        (["eval", "MODEL", "--text", "a", "--pairs", "b"], 2, "give one of --text (decoders), --pairs"),
        (["eval", "MODEL", "--text", "none.txt"], 1, "there is no file none.txt"),
        (["eval", "MODEL", "--text", "TEXT", "--length", "65"], 1, "exceeds the model's context of 64"),
        (["eval", "MODEL", "--pairs", "TEXT"], 1, "is a decoder"),
        (["methods", "svdd"], 1, "did you mean 'svd'?"),
        (["methods", "svdd", "--json"], 1, "did you mean 'svd'?"),
        (["show", "none"], 1, "there is no model folder none"),
        (["show", "MODEL/../tiny-lama"], 1, "did you mean"),
        (["densify", "MODEL", "--out", "x"], 1, "is not compressed by eckart"),
        (["densify", "MODEL"], 2, "--out"),
        (["demo", "--keep", "2"], 1, "must lie in (0, 1], got 2"),
        (["squash"], 2, "squash"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence_on_stderr(args, code, message, model, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    named = {"MODEL": str(model), "TEXT": str(text), "EMPTY": str(tmp_path / "empty")}
    given = [named.get(a, a.replace("MODEL", str(model))) for a in args]
    result = eckart(*given, code=code)
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.startswith("eckart: ")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*")), "a failed run left something"


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("eckart", [], {}),
        ("eckart", ["anchor=0.5", "bias=false", "round_to=8"], {"anchor": 0.5, "bias": False, "round_to": 8}),
        ("eckart", ["anchor=1", "bias=yes", "storage=lowrank"], {"anchor": 1.0, "bias": True, "storage": "lowrank"}),
        ("fwsvd", ["labels=sampled"], {"labels": "sampled"}),
        ("svd", ["allocation=threshold"], "needs a method that scores spectra"),
        ("eckart", ["anchor"], "--set takes name=value, got 'anchor'"),
        ("eckart", ["=3"], "--set takes name=value"),
        ("eckart", ["anchor=1", "anchor=0"], "anchor is set twice"),
        ("eckart", ["anchor=2"], "anchor must lie in"),
        ("eckart", ["anchor=nan"], "anchor .* finite number"),
        ("eckart", ["bias=perhaps"], "bias of eckart must be true or false, got 'perhaps'"),
        ("eckart", ["round_to=2.5"], "round_to of eckart must be a whole number, got '2.5'"),
        ("eckart", ["storage=dense"], "storage of eckart must be one of lowrank, pivoted, got 'dense'"),
        ("svd", ["anchor=1"], "svd has no setting 'anchor'"),
        ("nothing", [], "unknown method 'nothing'"),
    ],
)  # fmt: skip
def test_settings_are_typed_by_the_methods_signature(method, given, expected) -> None:
    if isinstance(expected, str):
        with pytest.raises(EckartError, match=expected):
            parse_settings(method, given)
    else:
        found = parse_settings(method, given)
        assert found == expected
        assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in expected.items()}


def test_methods_are_listed_and_explained() -> None:
    assert all(name in eckart("methods").stdout for name in METHODS)
    page = eckart("methods", "asvd").stdout
    assert "alpha" in page
    assert "activation-aware SVD" in page
    listed = json.loads(eckart("methods", "--json").stdout)
    assert [each["name"] for each in listed] == list(METHODS)
    one = json.loads(eckart("methods", "asvd", "--json").stdout)
    assert one in listed
    assert {"name": "alpha", "type": "float", "default": 0.5, "common": False} in one["settings"]


def test_a_model_is_compressed_measured_shown_and_made_dense(model, text, tmp_path) -> None:
    run = small(model, text, tmp_path / "small", "--json", "--set", "bias=false")
    outcome = json.loads(run.stdout)
    assert run.stderr == ""
    assert outcome["plan"]["parameters_after"] <= 0.7 * outcome["plan"]["parameters_before"]
    assert outcome["settings"]["settings"]["bias"] is False

    contents = json.loads(eckart("show", tmp_path / "small", "--json").stdout)
    assert contents["parameters"] == outcome["plan"]["parameters_after"]
    assert contents["dense_parameters"] == outcome["plan"]["parameters_before"]
    assert contents["nbytes"] == outcome["plan"]["bytes_after"]
    planned = {layer["name"]: layer for layer in outcome["plan"]["layers"] if layer["structure"] != "dense"}
    for layer in contents["layers"]:
        for key in ("structure", "rank", "numbers", "dense_numbers", "nbytes", "shape"):
            assert layer[key] == planned[layer["name"]][key], (layer["name"], key)
    assert len(contents["layers"]) == len(planned)
    assert str(outcome["plan"]["layers"][0]["name"]) in eckart("show", tmp_path / "small").stdout

    assert eckart("densify", tmp_path / "small", "--out", tmp_path / "dense").stdout.startswith("written to ")
    measured = [
        json.loads(eckart("eval", tmp_path / name, "--text", text, "--json").stdout)["nats_per_token"]
        for name in ("small", "dense")
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in loaded.parameters()) == outcome["plan"]["parameters_after"]


def test_a_fine_tune_is_stored_and_restored(model, tmp_path) -> None:
    tuned = LlamaForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    given = ("delta", model, tmp_path / "tuned", "--bytes", "40000")
    made = json.loads(eckart(*given, "--out", tmp_path / "delta", "--json").stdout)
    assert made["nbytes"] == sum(p.stat().st_size for p in (tmp_path / "delta").iterdir()) <= 40_000
    assert "model.embed_tokens.weight" in eckart(*given, "--bits", "4", "--out", tmp_path / "four").stdout
    held = json.loads(eckart("show", tmp_path / "delta", "--json").stdout)
    assert (held["nbytes"], held["base"]) == (made["nbytes"], model.name)
    assert {t["name"]: t["nbytes"] for t in held["tensors"]} == {t["name"]: t["nbytes"] for t in made["tensors"]}
    assert f"a difference from {model.name}" in eckart("show", tmp_path / "delta").stdout
    back = json.loads(eckart("restore", model, tmp_path / "delta", "--out", tmp_path / "back", "--json").stdout)
    assert back["exact"] is True
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.float32
    swapped = eckart("restore", tmp_path / "delta", model, "--out", tmp_path / "other", code=1)
    assert "is a difference, not a model" in swapped.stderr
    wrong = eckart("restore", tmp_path / "tuned", tmp_path / "delta", "--out", tmp_path / "other", code=1)
    assert wrong.stderr.count("\n") == 1
    assert "give the base that it was made from" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_a_plan_is_printed_and_nothing_written(model, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (
        "compress",
        model,
        "--method",
        "svd-llm",
        "--keep",
        "0.7",
        "--calibration",
        text,
        "--samples",
        "8",
        "--length",
        "32",
    )
    table = eckart(*arguments, "--plan", "--no-cache")
    assert "model.layers.1.mlp.down_proj" in table.stdout
    assert "svd-llm at keep 0.7" in table.stdout
    assert "model.layers.*.mlp.down_proj" not in table.stdout
    plan = json.loads(eckart(*arguments, "--plan", "--json", "--no-cache").stdout)
    assert plan["parameters_after"] <= 0.7 * plan["parameters_before"]
    assert list(tmp_path.iterdir()) == []


def test_the_outcome_is_a_table(model, text, tmp_path) -> None:
    out = small(model, text, tmp_path / "small", "--method", "svd").stdout
    assert "written to " + str(tmp_path / "small") in out
    assert "loss, nats per token" in out
    assert "checked: a fresh process loads it, logits agree to " in out
    assert " x the dense model's" in out
    assert "\x1b" not in out
    assert "fresh process" not in small(model, text, tmp_path / "other", "--method", "svd", "--no-check").stdout


def test_other_budgets(model, text, tmp_path) -> None:
    arguments = ("compress", model, "--method", "svd", "--plan")
    plan = json.loads(eckart(*arguments, "--flops", "0.8x", "--json").stdout)
    assert 0.79 <= plan["spent"]["after"] / plan["spent"]["before"] <= 0.8
    table = eckart(*arguments, "--flops", "0.8x").stdout
    assert "svd at flops 0.8x: " in table
    assert "linear layers and head, one token: " in table
    assert "svd at bytes 200,000: " in eckart(*arguments, "--bytes", "200KB").stdout


def test_evaluation_is_printed(model, text) -> None:
    assert "perplexity" in eckart("eval", model, "--text", text, "--limit", "2").stdout
    found = json.loads(
        eckart("eval", model, "--text", text, "--limit", "2", "--stride", "8", "--length", "16", "--json").stdout
    )
    assert found["documents"] == 2


def test_what_json_cannot_hold_becomes_null(model, text, monkeypatch) -> None:
    from eckart.methods.evaluation import Evaluation

    endless = Evaluation(tokens=1, seconds=1.0, nats_per_token=1000.0, perplexity=float("inf"))
    monkeypatch.setattr("eckart.methods.evaluate.evaluate", lambda *a, **k: endless)
    found = json.loads(eckart("eval", model, "--text", text, "--json").stdout)
    assert found["perplexity"] is None
    assert found["nats_per_token"] == 1000.0


def test_an_interrupted_run_continues_to_the_same_bytes(model, text, tmp_path, monkeypatch) -> None:
    small(model, text, tmp_path / "straight")
    call = Bars.__call__

    def interrupt(self, stage: str, done: int, total: int) -> None:
        call(self, stage, done, total)
        if stage == "compress" and done == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Bars, "__call__", interrupt)
        stopped = small(model, text, tmp_path / "small", code=130)
    assert stopped.stdout == ""
    assert stopped.stderr == "eckart: interrupted; running the same command again continues where this one stopped\n"
    assert not (tmp_path / "small").exists()
    small(model, text, tmp_path / "small")
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes(), path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "small", "straight"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_ends_a_process_in_one_sentence(tmp_path) -> None:
    # What a shell runs in the background ignores Ctrl-C, and so would this.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{listen}; from eckart.cli.main import run; run()"
    command = [sys.executable, "-c", start, "compress", str(DEMO / "stories260k")]
    command += ["--keep", "0.8", "--calibration", str(DEMO / "train.txt"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert out == ""
    assert error == "eckart: interrupted; running the same command again continues where this one stopped\n"


def test_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-c", "from eckart.cli.main import run; run()", "methods", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_full_disks_and_missing_memory_are_said_in_one_sentence(model, text, monkeypatch) -> None:
    for error, sentence in (
        (OSError(28, "No space left on device", "/x/y"), "eckart: /x/y: No space left on device\n"),
        (MemoryError(), "eckart: there is not enough memory; close other programs or use fewer and shorter samples\n"),
    ):

        def fail(*args: object, error: Exception = error, **rest: object) -> None:
            raise error

        monkeypatch.setattr("eckart.methods.evaluate.evaluate", fail)
        assert eckart("eval", model, "--text", text, code=1).stderr == sentence


def test_warnings_come_without_the_line_of_code(model, text, monkeypatch) -> None:
    from eckart.methods import evaluate as module

    run = module.evaluate

    def warn(*args: object, **rest: object) -> object:
        warnings.warn("this is slow", UserWarning, stacklevel=1)
        return run(*args, **rest)

    monkeypatch.setattr(module, "evaluate", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = eckart("eval", model, "--text", text, "--json")
    assert result.stderr == "eckart: warning: this is slow\n"
    json.loads(result.stdout)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "patience", "shown"), [(_Terminal, 0.0, True), (_Terminal, 60.0, False), (io.StringIO, 0.0, False)]
)
def test_bars_are_for_people_who_wait(stream, patience, shown, monkeypatch) -> None:
    monkeypatch.setattr("eckart.cli.progress.PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stream())
    with Bars() as progress:
        for stage, total in (("forward", 4), ("backward", 3)):
            for done in range(total + 1):
                progress(stage, done, total)
        assert (sys.stderr.getvalue() != "") == shown
        assert ("backward" in sys.stderr.getvalue()) == shown


@pytest.mark.slow
def test_the_demonstration_compares_two_methods(tmp_path) -> None:
    result = eckart("demo", "--out", tmp_path / "demo", "--keep", "0.8")
    table = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.split()}
    losses = {name: float(table[name][-4]) for name in ("original", "svd-llm", "eckart")}
    assert losses["original"] < losses["eckart"] < losses["svd-llm"]
    assert "original: Once upon a time" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "demo/eckart") is not None


def test_an_elastic_folder_is_made_shown_cut_and_densified(model, text, tmp_path):
    made = ("--samples", "4", "--length", "32", "--calibration", text, "--elastic", "--least", "0.6")
    planned = eckart("compress", model, "--keep", "0.8", "--plan", *made).stdout
    assert "elastic: every size from keep 0.6 to 0.8; components take " in planned
    assert all(re.search(rf"{size} +[\d,]{{5,}} ", planned) for size in (0.6, 0.66, 0.727, 0.8))
    eckart("compress", model, "--keep", "0.8", "--out", tmp_path / "elastic", *made)
    assert "elastic: every size from keep 0.6 to 0.8" in eckart("show", tmp_path / "elastic").stdout
    assert "written to" in eckart("slice", tmp_path / "elastic", "--keep", "0.7", "--out", tmp_path / "cut").stdout
    assert "elastic:" not in eckart("show", tmp_path / "cut").stdout
    eckart("densify", tmp_path / "elastic", "--keep", "0.7", "--out", tmp_path / "one")
    eckart("densify", tmp_path / "cut", "--out", tmp_path / "other")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["cut", "elastic", "one", "other"]


def test_sizes_that_cannot_be_cut_are_one_sentence(model, tmp_path):
    result = eckart("slice", model, "--keep", "0.7", "--out", tmp_path / "cut", code=1)
    assert "is not elastic, so it has one size only" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "cut").exists()
