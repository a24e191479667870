"""Writing compressed folders: finished parts are kept, the output appears whole or not at all, shards hold it all."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eckart
from eckart.atomic import check_output
from eckart.errors import EckartError
from eckart.files import shards
from eckart.files.folder import INDEX, SINGLE, open_model, tensor_file
from eckart.files.writing import LayerRecord, Partial, layer_entries, publish, write_folder
from eckart.maps import LowRank, pivot
from eckart.progress import silent

DEMO = Path(str(files("eckart"))) / "demo" / "stories260k"
BLOCKS = [f"model.layers.{i}" for i in range(5)]


def record(name: str, bias: int = 0, **options) -> LayerRecord:
    low = LowRank(torch.randn(8, 3), torch.randn(3, 6))
    return LayerRecord.of(name, low, torch.zeros(bias) if bias else None, 0.25, **options)


@pytest.fixture
def partial(tmp_path) -> Partial:
    made = Partial(tmp_path / ".out.eckart-1234")
    made.begin({"out": "out"})
    return made


def test_a_record_counts_what_is_stored():
    low = LowRank(torch.randn(8, 3, dtype=torch.bfloat16), torch.randn(3, 6, dtype=torch.bfloat16))
    plain = LayerRecord.of("a", low, None, 0.5)
    assert (plain.structure, plain.rank, plain.numbers, plain.nbytes, plain.loss) == ("lowrank", 3, 42, 84, 0.5)
    assert plain.entry == {"kind": "linear", "map": low.spec(), "bias": False}
    pivoted, bias = pivot(LowRank(torch.randn(8, 3), torch.randn(3, 6))), torch.zeros(8)
    other = LayerRecord.of("a", pivoted, bias, 0.5)
    assert (other.structure, other.rank, other.numbers) == ("pivoted", 3, 3 * (8 + 6 - 3) + 8)
    assert other.nbytes == 4 * other.numbers + pivoted.order.nbytes
    assert other.entry["bias"] is True
    table = LayerRecord.of("e", low, None, 0.5, kind="embedding", padding_idx=1)
    assert table.entry == {"kind": "embedding", "map": low.spec(), "padding_idx": 1}


def test_entries_tie_the_head_only_to_a_compressed_embedding():
    records = [record("e", kind="embedding"), record("a.b")]
    assert layer_entries(records, "e", "h")["h"] == {"kind": "tied-head", "embedding": "e"}
    assert "h" not in layer_entries(records, "e", None)
    assert "h" not in layer_entries(records[1:], "e", "h")


def test_finished_parts_are_found_in_order(partial):
    partial.save_block(0, {"b.0.x": torch.ones(2)}, [record("b.0.x")])
    partial.save_block(2, {"b.2.x": torch.ones(2)}, [record("b.2.x")])
    assert partial.blocks_done() == 1  # what lies behind a gap does not count
    partial.save_block(1, {"b.1.x": torch.ones(2)}, [record("b.1.x"), record("b.1.y")])
    partial.save("head", {"h": torch.ones(2)}, [record("h")])
    partial.save("embedding", {"e": torch.ones(2)}, [record("e", kind="embedding")])
    assert partial.blocks_done() == 3
    assert [r.name for r in partial.records()] == ["e", "b.0.x", "b.1.x", "b.1.y", "b.2.x", "h"]
    again = Partial(partial.folder)
    again.begin({"out": "out"})
    assert again.records() == partial.records()
    partial.discard()
    assert not partial.folder.exists()


def written(partial: Partial, model, progress=silent) -> Path:
    """Write a folder in which one layer of the first block is low-rank and all else is as it was."""
    torch.manual_seed(0)
    low = LowRank(torch.randn(64, 5), torch.randn(5, 64))
    name, records = "model.layers.0.self_attn.q_proj", []
    for index, block in enumerate(BLOCKS):
        tensors = {key: model.read(key) for key in model.names if key.startswith(f"{block}.")}
        if index == 0:
            tensors.pop(f"{name}.weight")
            tensors |= {f"{name}.up.weight": low.up, f"{name}.down.weight": low.down}
            records = [LayerRecord.of(name, low, None, 0.0)]
        partial.save_block(index, tensors, records if index == 0 else [])
    entries = layer_entries(partial.records(), "model.embed_tokens", "lm_head")
    return write_folder(partial, model, BLOCKS, entries, {"method": "x"}, {"README.md": "card\n"}, progress)


def check(folder: Path) -> None:
    model, dense = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, DEMO))
    torch.manual_seed(0)
    up, down = torch.randn(64, 5), torch.randn(5, 64)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_submodule(name).dense(), up @ down)
    same = {key: t for key, t in dense.state_dict().items() if not key.startswith(name)}
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in same.items())


def test_a_folder_is_whole(partial, tmp_path):
    folder = written(partial, open_model(DEMO))
    publish(folder, tmp_path / "parent" / "out")
    out = tmp_path / "parent" / "out"
    companions = {"README.md", "config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"}
    assert companions <= {path.name for path in out.iterdir()}
    assert (out / "README.md").read_text() == "card\n"
    assert (out / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    assert not folder.exists()
    check(out)


def test_shards_hold_every_tensor_once(partial, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    steps = []
    folder = written(partial, open_model(DEMO), lambda *step: steps.append(step))
    written_files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(written_files) > 4
    assert all((folder / file).stat().st_size < 220_000 for file in written_files)
    names = [name for file in written_files for name in load_file(folder / file)]
    assert len(names) == len(set(names))
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"].keys() == set(names)
    assert not (folder / SINGLE).exists()
    assert steps == [("write", i, len(names)) for i in range(len(names) + 1)]
    assert tensor_file(folder).read("model.norm.weight").shape == (64,)
    check(folder)


def test_what_a_stopped_run_had_written_is_replaced(partial, monkeypatch):
    model = open_model(DEMO)
    first = written(partial, model)
    (first / "left.txt").write_text("")
    (first / SINGLE).write_bytes(b"half")
    again = written(partial, model)
    assert not (again / "left.txt").exists()
    check(again)


def test_nothing_compressed_leaves_the_config_alone(partial):
    model = open_model(DEMO)
    for index, block in enumerate(BLOCKS):
        partial.save_block(index, {k: model.read(k) for k in model.names if k.startswith(f"{block}.")}, [])
    folder = write_folder(partial, model, BLOCKS, {}, {}, {}, silent)
    assert json.loads((folder / "config.json").read_text()) == json.loads((DEMO / "config.json").read_text())
    before, after = load_file(DEMO / SINGLE), load_file(folder / SINGLE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_outputs_that_can_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "new" / "deep" / "er", tmp_path / "empty"):
        check_output(out)
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(EckartError, match="full already holds something; give a new or an empty one"):
        check_output(tmp_path / "full")
    with pytest.raises(EckartError, match="x is a file; give the path of a folder that does not exist yet"):
        check_output(tmp_path / "full" / "x")
    with pytest.raises(EckartError, match=r"x cannot be written to; give a folder elsewhere"):
        check_output(tmp_path / "full" / "x" / "out")
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(EckartError, match="cannot be written to; give a folder elsewhere"):
        check_output(tmp_path / "new")


def test_an_output_that_appears_meanwhile_is_not_replaced(partial, tmp_path):
    folder = written(partial, open_model(DEMO))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("")
    with pytest.raises(EckartError, match=r"cannot rename .*folder to .*out: .*; move it there by hand"):
        publish(folder, tmp_path / "out")
    assert (tmp_path / "out" / "theirs").is_file()
    check(folder)


def test_a_place_for_parts_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EckartError, match=r"cannot write beside .*file: .*; choose another --out"):
        Partial(tmp_path / "file" / ".out").begin({})


def test_an_existing_empty_output_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    eckart.compress(DEMO, tmp_path / "out", method="svd", keep=0.8)
    assert (tmp_path / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("spelling", [str, Path, lambda path: f"{path}/", lambda path: path / "." / ""])
def test_spellings_of_one_output(spelling, tmp_path):
    eckart.compress(DEMO, spelling(tmp_path / "out"), method="svd", keep=0.8)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_relative_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("out", "./deep/er", "../beside"):
        eckart.compress(DEMO, name, method="svd", keep=0.8)
        assert Path(name, "config.json").is_file()
        shutil.rmtree(Path(name))
    assert {path.name for path in tmp_path.iterdir()} == {"work"}
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"deep"}
    with pytest.raises(EckartError, match="already holds something"):
        eckart.compress(DEMO, ".", method="svd", keep=0.8)
