"""`eckart adapt` and `eckart adapters` as a person types them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eckart
from eckart.cli.main import app

DEMO = Path(eckart.__file__).parent / "demo"


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def adapt(out: Path, *more: object) -> tuple[int, str, str]:
    quick = ("--steps", 3, "--batch", 2, "--length", 16)
    return run("adapt", DEMO / "stories260k", "--data", DEMO / "train.txt", "--out", out, *quick, *more)


def test_a_fine_tune_is_reported(tmp_path: Path):
    code, out, _ = adapt(tmp_path / "a", "--method", "dora", "--rank", 2, "--json")
    assert code == 0
    values = json.loads(out)
    assert values["method"] == "dora"
    assert values["before"].keys() == values["after"].keys() == {"loss"}
    code, out, _ = adapt(tmp_path / "b", "--target", "q_proj", "--set", "alpha=4", "--set", "rank=2")
    assert code == 0
    assert "held out" in out
    assert "1,280 of" in out  # rank 2 of five layers of 64 x 64


def test_a_probed_classification_reports_its_calibration(tmp_path: Path):
    rows = tmp_path / "rows.tsv"
    words = [f"the {word} ran\t{word}" for word in ("dog", "cat")]
    rows.write_text("\n".join(["text\tkind", *words * 15]))
    code, out, _ = run(
        "adapt", DEMO / "stories260k", "--data", rows, "--label-field", "kind", "--out", tmp_path / "a", "--steps", 2,
        "--batch", 2, "--length", 16, "--rank", 2, "--probe", 3,
    )  # fmt: skip
    assert code == 0
    assert "3 steps of the head alone, then 2 steps" in out
    assert "expected calibration error 0." in out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--method", "lorra"), "unknown method 'lorra'; did you mean 'lora'"),
        (("--rank", 0), "rank must be at least 1, got 0"),
        (("--set", "alhpa=3"), "lora has no setting 'alhpa'; did you mean 'alpha'"),
        (("--target", "q_prj"), "targets name 'q_prj', which no linear layer is called"),
        (("--format", "bin"), "--format must be eckart or peft, got 'bin'"),
        (("--probe", 3), "probe trains the head of a classification, and texts have none"),
        (("--validation", "nowhere.txt"), "there is no file nowhere.txt"),
        (("--method", "incremental", "--after", "nowhere"), "nowhere holds no adapter"),
        (("--method", "soka", "--format", "peft"), "PEFT has no type"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, more: tuple[object, ...], sentence: str):
    code, out, error = adapt(tmp_path / "out", *more)
    assert code == 1
    assert sentence in " ".join(error.split())
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_ways_to_combine_are_printed():
    code, out, _ = run("adapters", "task-masks")
    assert code == 0
    assert "threshold" in out


def test_methods_of_adaptation_are_listed_and_printed():
    code, out, _ = run("adapters", "--json")
    assert code == 0
    assert [method["name"] for method in json.loads(out)] == list(eckart.ADAPTERS)
    code, out, _ = run("adapters", "dora")
    assert code == 0
    assert "magnitude" in out.lower()
    assert "Liu et al. 2024" in out
    code, _, error = run("adapters", "dorra")
    assert code == 1
    assert "did you mean 'dora'" in error
