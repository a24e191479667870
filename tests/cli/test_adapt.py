"""`eckart adapt` and `eckart adapters` as a person types them."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel
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
        (("--rate", "foo"), "--rate must be a number, auto or curvature, got 'foo'"),
        (("--rate", "inf"), "rate must be finite, got inf"),
        (("--length", 0), "length must be at least 2, got 0"),
        (("--length", 1), "length must be at least 2, got 1"),
        (("--seed", -1), "seed must be a whole number from 0 to 4294967295, got -1"),
        (("--seed", 10**30), "seed must be a whole number from 0 to 4294967295"),
        (("--set", "dropout=2"), "dropout must be at least 0 and less than 1, got 2.0"),
        (("--method", "ties"), "ties combines adapters that are there"),
        (("--method", "DoRA"), "unknown method 'DoRA'; did you mean 'dora'"),
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


def test_an_encoder_is_not_taught_next_tokens(tmp_path: Path):
    config = BertConfig(
        vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for made, name in ((BertModel(config), "plain"), (BertForMaskedLM(config), "masked")):
        made.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / "stories260k" / file, tmp_path / name)
        code, _, error = run("adapt", tmp_path / name, "--data", DEMO / "train.txt", "--out", tmp_path / "out")
        assert code == 1
        assert "was not trained to predict next tokens; give a label field" in " ".join(error.split())
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "masked"}


def test_a_classifier_is_not_made_of_lost_weights(tmp_path: Path):
    folder, rows = tmp_path / "lossy", tmp_path / "rows.tsv"
    shutil.copytree(DEMO / "stories260k", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows.write_text("text\tkind\na dog\tdog\na cat\tcat\n")
    code, _, error = run("adapt", folder, "--data", rows, "--label-field", "kind", "--out", tmp_path / "out")
    assert code == 1
    assert "lacks the weights model.layers.1.mlp.up_proj.weight (1 in all)" in " ".join(error.split())


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path):
    assert adapt(tmp_path / "made", "--rank", 2)[0] == 0
    code, _, error = run("eval", tmp_path / "made", "--text", DEMO / "valid.txt")
    assert code == 1
    assert "is an adapter, not a model; `eckart fold MODEL " in " ".join(error.split())


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


def test_saved_adapters_are_measured_and_folded(tmp_path: Path):
    assert adapt(tmp_path / "a", "--rank", 2, "--rate", 0.01)[0] == 0
    measure = ("--text", DEMO / "valid.txt", "--limit", 3, "--json")
    on, off = (
        json.loads(run("eval", DEMO / "stories260k", *measure, *more)[1])
        for more in (("--adapter", tmp_path / "a"), ())
    )
    assert on["nats_per_token"] != off["nats_per_token"]
    code, out, _ = run("fold", DEMO / "stories260k", tmp_path / "a", "--out", tmp_path / "whole")
    assert code == 0
    assert "35 of 35 layers hold all of the change" in out
    whole = json.loads(run("eval", tmp_path / "whole", *measure)[1])
    assert whole["nats_per_token"] == pytest.approx(on["nats_per_token"], abs=1e-5)


def test_a_fold_that_cannot_be_says_why(tmp_path: Path):
    assert adapt(tmp_path / "a", "--rank", 2)[0] == 0
    for adapter, more, reason in (
        (tmp_path / "no", (), "holds no adapter"),
        (DEMO / "stories260k", (), "holds no adapter"),
        (tmp_path / "a", ("--calibration", tmp_path / "none.txt"), "there is no file"),
    ):
        code, _, error = run("fold", DEMO / "stories260k", adapter, "--out", tmp_path / "whole", *more)
        assert (code, reason in " ".join(error.split())) == (1, True), error
        assert not (tmp_path / "whole").exists()


def test_a_classifier_is_measured_on_labelled_rows(tmp_path: Path):
    rows = tmp_path / "rows.tsv"
    lines = [f"the {w} ran to the {o}\t{w}" for o in ("house", "tree", "sea") for w in ("dog", "cat")]
    rows.write_text("sentence\tkind\n" + "\n".join(lines * 8) + "\n")
    fields = ("--text-field", "sentence", "--label-field", "kind")
    steps = ("--steps", 20, "--batch", 8, "--rank", 4, "--rate", 0.01, "--validation", rows, "--json")
    code, out, _ = run("adapt", DEMO / "stories260k", "--data", rows, *fields, *steps, "--out", tmp_path / "a")
    assert code == 0
    tuned = json.loads(out)
    assert tuned["labels"] == ["cat", "dog"]
    measure = ("--labelled", rows, *fields, "--json")
    code, out, _ = run("eval", DEMO / "stories260k", "--adapter", tmp_path / "a", *measure)
    assert code == 0
    assert json.loads(out)["accuracy"] == tuned["after"]["accuracy"] > 0.9
    assert run("fold", DEMO / "stories260k", tmp_path / "a", "--out", tmp_path / "whole")[0] == 0
    values = json.loads(run("eval", tmp_path / "whole", *measure)[1])
    assert values["accuracy"] == tuned["after"]["accuracy"]
    assert values["nats_per_example"] == pytest.approx(tuned["after"]["loss"], abs=1e-4)
    assert "accuracy" in run("eval", tmp_path / "whole", *measure[:-1])[1]
    code, _, error = run("eval", DEMO / "stories260k", *measure)
    assert (code, "has no head for classes" in " ".join(error.split())) == (1, True)
