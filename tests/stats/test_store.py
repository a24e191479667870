"""Statistics on disk: what is saved comes back, what is there is whole, and other content has another name."""

import pytest
import torch

from eckart.stats import Store, content_key
from eckart.stats import store as module

IDS = torch.arange(12).view(2, 6)


def test_tensors_come_back_by_part_and_name(tmp_path):
    store = Store(tmp_path / "new" / "folder")
    parts = {
        "a.b+a.c": {"x": torch.randn(3, 2), "n": torch.tensor(4)},
        "d": {"x": torch.ones(2, dtype=torch.float64)},
    }
    store.save("inputs", 7, parts)
    back = store.load("inputs", 7)
    assert back.keys() == parts.keys()
    for part, tensors in parts.items():
        assert back[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[part][name].dtype == tensor.dtype
            assert torch.equal(back[part][name], tensor)
    assert store.load("inputs", 7, lambda part: part == "d").keys() == {"d"}


def test_kinds_are_complete_or_not(tmp_path):
    store = Store(tmp_path)
    for index in (0, 2):
        store.save("inputs", index, {"a": {"x": torch.zeros(4)}})
    assert store.has("inputs", 0)
    assert store.has("inputs", 1)
    assert not store.has("inputs", 3)
    assert not store.has("gradients", 1)
    store.save("inputs", 1, {"a": {"x": torch.zeros(4)}})
    assert store.has("inputs", 3)
    assert store.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir()) > 0


def test_dropping_and_clearing(tmp_path):
    store = Store(tmp_path / "statistics")
    for kind in ("inputs", "boundary"):
        store.save(kind, 0, {"a": {"x": torch.zeros(4)}})
    store.drop("boundary", 3)
    assert store.has("inputs", 1)
    assert not store.has("boundary", 1)
    store.clear()
    store.clear()
    assert not store.folder.exists()


def test_saving_is_atomic(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save("inputs", 0, {"a": {"x": torch.zeros(4)}})

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("eckart.atomic.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save("inputs", 0, {"a": {"x": torch.ones(4)}})
    assert torch.equal(store.load("inputs", 0)["a"]["x"], torch.zeros(4))
    assert [path.name for path in tmp_path.iterdir()] == ["inputs-0000.safetensors"]


@pytest.mark.parametrize(
    ("parts", "samples"),
    [
        (("model", "1"), [IDS]),
        (("model1",), [IDS]),
        (("mode", "l"), [IDS]),
        (("model",), [IDS + 1]),
        (("model",), [IDS.view(3, 4)]),
        (("model",), [IDS[:1], IDS[1:]]),
        (("model",), [IDS.flip(0)]),
        (("model",), []),
    ],
)
def test_other_content_has_another_name(parts, samples):
    assert content_key(parts, samples) != content_key(("model",), [IDS])


def test_equal_content_has_one_name(monkeypatch):
    key = content_key(("model",), [IDS])
    assert content_key(["model"], (IDS.clone().to(torch.int32),)) == key
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert content_key(("model",), [IDS]) != key
