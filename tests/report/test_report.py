"""Tables: complete in a pipe, readable on a terminal of 80 columns, and right in what they add up."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from eckart.files.inspect import Contents, LayerContents
from eckart.methods.compress.outcome import LayerPlan, Measured, Outcome, Plan
from eckart.methods.compress.table import METHODS
from eckart.methods.evaluation import Evaluation
from eckart.report import units
from eckart.report.console import print_all
from eckart.report.pages import method_page, method_values, methods_table
from eckart.report.tables import (
    comparison_table,
    contents_table,
    evaluation_table,
    outcome_table,
    plan_table,
)

NAMES = [
    f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]


def layer(name: str, number: int, dense: bool = False) -> LayerPlan:
    numbers = 10_000 if dense else 6_000
    structure, rank = ("dense", 100) if dense else ("pivoted", 20 + number)
    return LayerPlan(name, "linear", (100, 100), structure, rank, numbers, 10_000, 4 * numbers, 0.0 if dense else 0.01)


def plan(count: int = 36, unit: str = "nats per token") -> Plan:
    layers = tuple(layer(name, i, dense=name == "model.layers.3.mlp.down_proj") for i, name in enumerate(NAMES[:count]))
    return Plan("eckart", 0.6, 400_000, 240_000, 1_600_000, 960_000, unit, layers)


def piped(*parts) -> str:
    stream = io.StringIO()
    print_all(*parts, file=stream)
    return stream.getvalue()


def on_terminal(part, width: int = 80) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None, highlight=False, markup=False)
    console.print(part)
    return stream.getvalue()


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_few_layers_have_a_row_each_with_their_full_name() -> None:
    text = piped(plan_table(plan(24)))
    for name in NAMES[:24]:
        assert [row[0] for row in rows(text) if row].count(name) == 1
    assert ["model.layers.1.mlp.down_proj", "pivoted", "25", "6.00", "k", "60.0", "%", "24.0", "kB", "0.0100"] in rows(
        text
    )
    assert ["model.layers.3.mlp.down_proj", "dense", "full", "10.0", "k", "100.0", "%", "40.0", "kB", "-"] in rows(text)


def test_many_layers_share_rows_by_name_and_structure() -> None:
    text = piped(plan_table(plan()))
    names = [row[0] for row in rows(text) if row and row[0].startswith("model.")]
    down = "model.layers.*.mlp.down_proj"
    assert names == ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.o_proj", down, down]
    assert [down, "11", "pivoted", "22-55", "66.0", "k", "60.0", "%", "264", "kB", "0.1100"] in rows(text)
    assert [down, "1", "dense", "full", "10.0", "k", "100.0", "%", "40.0", "kB", "-"] in rows(text)
    assert all(name in piped(plan_table(plan(), every_layer=True)) for name in NAMES)


def test_the_plan_adds_up() -> None:
    text = piped(plan_table(plan()))
    assert "eckart at keep 0.6: 60.0 % of 400,000 parameters remain, 240,000; 1.60 MB become 960 kB" in text
    assert "predicted increase of the loss: 0.3500 nats per token" in text
    assert "predicted increase" not in piped(plan_table(plan(unit="relative squared error")))


def test_relative_errors_are_averaged_where_losses_are_added() -> None:
    down = "model.layers.*.mlp.down_proj"
    text = piped(plan_table(plan(unit="relative squared error")))
    assert [down, "11", "pivoted", "22-55", "66.0", "k", "60.0", "%", "264", "kB", "0.0100"] in rows(text)
    assert "error: relative squared error, the mean of a row" in text
    assert "loss: predicted, nats per token" in piped(outcome_table(outcome(None)))


def test_pipes_get_neither_colour_nor_trailing_blanks() -> None:
    for part in (plan_table(plan()), methods_table(), method_page("eckart")):
        text = piped(part)
        assert "\x1b" not in text
        assert all(line == line.rstrip() for line in text.splitlines())
        assert text.endswith("\n")


@pytest.mark.parametrize(
    "part", [plan_table(plan()), plan_table(plan(), every_layer=True), methods_table(), method_page("afm")]
)
def test_nothing_is_lost_on_80_columns(part) -> None:
    text = on_terminal(part)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_names_break_behind_dots_and_only_where_they_must() -> None:
    narrow = on_terminal(plan_table(plan()))
    assert "model.layers.*. " in narrow
    assert "self_attn.q_proj" in narrow
    assert "model.layers.*.self_attn.q_proj " in on_terminal(plan_table(plan()), width=120)


def outcome(measured: Measured | None) -> Outcome:
    return Outcome(plan(), Path("small"), measured, 125.0, 2_500_000_000, {})


def test_the_outcome_compares_before_and_after() -> None:
    text = piped(outcome_table(outcome(Measured("loss", 1.4442, 1.6, 8192, True))))
    assert ["parameters", "400,000", "240,000", "-40.0", "%"] in rows(text)
    assert ["bytes", "1.60", "MB", "960", "kB", "-40.0", "%"] in rows(text)
    assert ["loss,", "nats", "per", "token", "1.4442", "1.6000", "+0.1558"] in rows(text)
    assert "8,192 tokens that the fits did not see" in text
    assert "2 min 5 s, 2.50 GB of memory" in text
    assert "written to small" in text


def test_the_outcome_says_when_the_text_was_too_short_or_missing() -> None:
    assert "tokens of the calibration text" in piped(outcome_table(outcome(Measured("distance", 0.0, 0.1, 10, False))))
    assert "measured" not in piped(outcome_table(outcome(None)))


def test_contents_say_how_they_were_made() -> None:
    layers = (LayerContents("model.layers.0.q", "linear", "lowrank", (10, 10), 3, 60, 100, 240),)
    measured = {"name": "loss", "before": 1.0, "after": 1.25, "tokens": 10, "held_out": True}
    made_by = {"method": "svd", "settings": {"heal": 0}, "calibration": None, "measured": measured, "bytes_before": 3}
    text = piped(contents_table(Contents(Path("x"), "LlamaForCausalLM", layers, 160, 200, 640, made_by)))
    assert ["model.layers.0.q", "lowrank", "3", "60", "60.0", "%", "240", "B"] in rows(text)
    assert "LlamaForCausalLM: 160 parameters, 640 B; 80.0 % of the dense model's 200" in text
    assert "loss 1.0000 before, 1.2500 after" in text
    assert "made by method svd, heal 0\n" in text
    dense = piped(contents_table(Contents(Path("x"), "LlamaForCausalLM", (), 200, 200, 800, {})))
    assert "no compressed layers" in dense


def test_every_method_is_listed_with_its_settings() -> None:
    text = piped(methods_table())
    for name in METHODS:
        assert [row[0] for row in rows(text) if row].count(name) == 1
        values = method_values(name)
        page = piped(method_page(name))
        for setting in values["settings"]:
            assert [
                row for row in rows(page) if row and row[0] == setting["name"] and row[-1] == str(setting["default"])
            ]
    assert "lowrank | pivoted" in piped(method_page("svd"))
    assert "Eckart and Young 1936" in piped(method_page("svd"))


def test_markup_in_texts_is_left_alone() -> None:
    assert "E[x x^T]" in piped(method_page("svd-llm"))
    assert "[bold]a" in piped(comparison_table([("[bold]a", 1, 4, Evaluation(tokens=1, seconds=1.0))]))


def test_evaluations_show_what_applies() -> None:
    words = piped(
        evaluation_table(
            Evaluation(tokens=1000, seconds=2.0, documents=3, nats_per_token=1.5, perplexity=4.48, bits_per_byte=0.5)
        )
    )
    assert ["perplexity", "4.4800"] in rows(words)
    assert ["tokens", "per", "second", "500"] in rows(words)
    assert "Spearman" not in words
    sentences = piped(evaluation_table(Evaluation(tokens=1000, seconds=2.0, pairs=7, spearman=0.82)))
    assert ["Spearman", "correlation", "0.8200"] in rows(sentences)
    assert "perplexity" not in sentences


def test_models_beside_each_other() -> None:
    found = Evaluation(tokens=1000, seconds=2.0, documents=3, nats_per_token=1.5, perplexity=4.48, bits_per_byte=0.5)
    text = piped(comparison_table([("original", 1000, 4000, found), ("small", 600, 2400, found)]))
    assert ["small", "600", "2.40", "kB", "1.5000", "4.480", "500"] in rows(text)


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (units.count, 0, "0"),
        (units.count, 999, "999"),
        (units.count, 999.7, "1.00 k"),
        (units.count, 999_950, "1.00 M"),
        (units.count, 12_345, "12.3 k"),
        (units.count, 9_996, "10.0 k"),
        (units.count, 3_148_224, "3.15 M"),
        (units.count, 7.24e9, "7.24 G"),
        (units.count, 99_960_000, "100 M"),
        (units.size, 812, "812 B"),
        (units.size, 6_650_000, "6.65 MB"),
        (units.share, 0.6, "60.0 %"),
        (units.duration, 0.84, "0.8 s"),
        (units.duration, 59.97, "1 min 0 s"),
        (units.duration, 125, "2 min 5 s"),
        (units.duration, 12_000, "3 h 20 min"),
        (units.loss, 0.0, "-"),
        (units.loss, 0.12345, "0.1235"),
        (units.loss, 0.000012345, "1.23e-05"),
    ],
)
def test_numbers_in_words(function, value, expected) -> None:
    assert function(value) == expected
