"""The model card: what it says, what it leaves out, and that others can read it."""

import json

import pytest
from huggingface_hub import metadata_load

from eckart.errors import EckartError
from eckart.files.card import inherited, model_card

FIGURES = {
    "parameters_before": 1000,
    "parameters_after": 600,
    "bytes_before": 2000,
    "bytes_after": 1210,
    "measured": {"name": "loss", "before": 1.44421, "after": 1.6, "tokens": 8192, "held_out": True},
}
LAYERS = [
    {"structure": "pivoted", "rank": 8, "numbers": 100, "dense_numbers": 300},
    {"structure": "pivoted", "rank": 12, "numbers": 150, "dense_numbers": 300},
    {"structure": "dense", "rank": 16, "numbers": 256, "dense_numbers": 256},
]
SETTINGS = {
    "method": "eckart",
    "keep": 0.6,
    "calibration": "/home/somebody/train.txt",
    "settings": {"anchor": 0.3},
    "length": None,
}


def test_the_card_states_what_was_measured_and_how_to_load_it() -> None:
    card = model_card("small-llama", SETTINGS, FIGURES, LAYERS)
    assert "60.0 % of the parameters remain" in card
    assert "| parameters | 1,000 | 600 |" in card
    assert "| bytes | 2,000 | 1,210 |" in card
    assert "| loss, nats per token | 1.4442 | 1.6000 |" in card
    assert "8,192 held-out tokens" in card
    assert "= AutoModelForCausalLM.from_pretrained(folder)" in card
    assert "| pivoted | 2 | 8 to 12 | 600 | 250 |" in card
    assert "| dense | 1 | full | 256 | 256 |" in card
    assert "| anchor | `0.3` |" in card
    assert card.startswith("---\nlibrary_name: ")
    assert card.endswith("|\n")
    assert "None" not in card
    assert "somebody" not in card, "a card must not say where its author keeps files"
    assert "\n\n\n" not in card


def test_tables_have_no_gaps_that_would_end_them() -> None:
    card = model_card("m", SETTINGS, FIGURES, LAYERS)
    for heading in ("Before and after", "Layers", "Settings"):
        table = card.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
        assert len(table) > 2
        assert all(line.startswith("|") and line.endswith("|") for line in table)
        assert len({line.count("|") for line in table}) == 1


def test_the_front_matter_is_read_back_by_the_hub_library(tmp_path) -> None:
    card = tmp_path / "README.md"
    card.write_text(model_card("m", SETTINGS, {**FIGURES, "base_model": "org/base", "license": "apache-2.0"}, LAYERS))
    facts = metadata_load(card)
    assert facts["library_name"] == "transformers"
    assert "eckart" in facts["tags"]
    assert facts["base_model"] == "org/base"
    assert facts["license"] == "apache-2.0"
    assert "base_model" not in model_card("m", SETTINGS, FIGURES, LAYERS)


def test_an_encoder_is_loaded_without_a_head() -> None:
    measured = {"name": "distance", "before": 0.0, "after": 0.01, "tokens": 100, "held_out": False}
    card = model_card("m", SETTINGS, {**FIGURES, "measured": measured}, LAYERS)
    assert "import AutoTokenizer, AutoModel\n" in card
    assert "100 tokens of the calibration text" in card


def test_unmeasured_runs_have_a_card_too() -> None:
    card = model_card("m", {}, {k: v for k, v in FIGURES.items() if k != "measured"}, LAYERS)
    assert "was measured on" not in card


@pytest.mark.parametrize(
    ("config", "card", "expected"),
    [
        ({"_name_or_path": "org/name"}, "", {"base_model": "org/name"}),
        ({"_name_or_path": "/home/me/models/x"}, "", {}),
        ({"_name_or_path": "./x/y"}, "", {}),
        (
            {},
            "---\nbase_model: org/other\nlicense: mit\ntags:\n- a\n---\n",
            {"base_model": "org/other", "license": "mit"},
        ),
        ({}, "---\nbase_model: [broken\nlicense: mit\n---\n", {"license": "mit"}),
        ({}, "no front matter\nlicense: mit\n", {}),
    ],
)
def test_only_what_the_original_states_is_inherited(tmp_path, config, card, expected) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if card:
        (tmp_path / "README.md").write_text(card)
    assert inherited(tmp_path) == expected


def test_a_folder_without_config_is_named(tmp_path) -> None:
    with pytest.raises(EckartError, match=r"no config\.json"):
        inherited(tmp_path)
