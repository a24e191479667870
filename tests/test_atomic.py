"""A reader sees the old file or the whole new one, and a failure leaves nothing behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eckart.atomic import aligned, copy_file, replacing, write_json, write_tensors, write_text
from eckart.errors import EckartError
from eckart.files.adapters import read_tensors
from eckart.stats import Store


def test_writers(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"b": 1, "a": [2]})
    write_text(tmp_path / "a.txt", "é\n")
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6).view(2, 3).mT, "empty": torch.zeros(0, 3)})
    copy_file(tmp_path / "a.txt", tmp_path / "b.txt")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"b": 1, "a": [2]}
    assert (tmp_path / "b.txt").read_text("utf-8") == "é\n"
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(6).view(2, 3).mT)
    assert {p.name for p in tmp_path.iterdir()} == {"new", "a.txt", "a.safetensors", "b.txt"}


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename across file systems is not atomic
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EckartError, match=r"cannot write .*file/a\.txt: .*; free some space or choose another place"):
        write_text(tmp_path / "file" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EckartError, match=r"cannot write .*folder: "):
        write_tensors(tmp_path / "folder", {"x": torch.zeros(1)})
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


def test_what_is_read_lies_where_torch_would_have_put_it(tmp_path):
    """Products of tensors that begin elsewhere differ in their last bits on some processors."""
    odd = {f"t{i}": torch.randn(i) for i in (3, 5, 7, 64)}
    write_tensors(tmp_path / "a.safetensors", odd)
    store = Store(tmp_path / "store")
    store.save("kind", 0, {"part": odd})
    for found in (read_tensors(tmp_path / "a.safetensors"), store.load("kind", 0)["part"]):
        assert all(torch.equal(found[name], tensor) for name, tensor in odd.items())
        assert {tensor.data_ptr() % 64 for tensor in found.values()} == {0}
    own = odd["t64"]
    assert aligned(own) is own
