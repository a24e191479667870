"""Files written by earlier versions load, and are written today byte for byte."""

import json
from pathlib import Path

import pytest
import safetensors.torch

from eckart.maps import FAMILIES, from_spec
from eckart.testing.golden import golden_maps, write_missing
from eckart.testing.laws import saved

FOLDER = Path(__file__).parent / "golden"
GOLDEN = golden_maps()


def test_every_family_has_golden_files():
    assert set(GOLDEN) == set(FAMILIES)
    assert {path.name for path in FOLDER.iterdir()} == {
        f"{f}.{end}" for f in FAMILIES for end in ("json", "safetensors")
    }


@pytest.mark.parametrize("family", GOLDEN)
def test_golden_file(family: str):
    text = (FOLDER / f"{family}.json").read_text()
    data = (FOLDER / f"{family}.safetensors").read_bytes()
    loaded = from_spec(json.loads(text), safetensors.torch.load(data), FAMILIES)
    assert loaded == GOLDEN[family]
    assert loaded.dtype == GOLDEN[family].dtype
    assert saved(loaded) == (text, data)
    assert saved(GOLDEN[family]) == (text, data)
    assert len(data) < 1000


def test_existing_files_are_not_rewritten(tmp_path: Path):
    assert write_missing(tmp_path / "golden") == list(GOLDEN)
    (tmp_path / "golden" / "Dense.json").write_text("kept")
    (tmp_path / "golden" / "Sum.json").unlink()
    assert write_missing(tmp_path / "golden") == ["Sum"]
    assert (tmp_path / "golden" / "Dense.json").read_text() == "kept"
