"""The two folders of adapters as files: what is damaged, of a later version or of no known kind is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eckart.errors import EckartError
from eckart.files.adapters import SPEC, TENSORS, StoredAdapter, StoredLayer, read_adapter, sketch, write_adapter
from eckart.files.changes import (
    GROUPED,
    KERNEL,
    KINDS,
    LEFT,
    MASKED,
    MULTIPLIED,
    PLUS,
    RESCALED,
    ROUTED,
    TIMES,
    StoredChange,
    digest_of,
)
from eckart.files.peft import CONFIG, PeftAdapter, block_size, read_peft, write_peft
from eckart.files.peft import TENSORS as PEFT_TENSORS
from eckart.maps import Cayley, Dense, Diagonal, Hadamard, LowRank, Product, packed, sparse_of

GOLDEN = Path(__file__).parent / "golden" / "adapter"

BASE = Dense(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))


def adapter() -> StoredAdapter:
    torch.manual_seed(1)
    changes = (
        StoredChange(PLUS, LowRank(torch.randn(6, 2), torch.randn(2, 4)), 1 / 3, 0.1, ("delta.down.weight",)),
        StoredChange(TIMES, Cayley(torch.randn(2, 1), 2)),
        StoredChange(PLUS, Product((Dense(torch.randn(6, 1).bfloat16()), Dense(torch.randn(1, 4).bfloat16())))),
        StoredChange(RESCALED, Diagonal(torch.rand(6, dtype=torch.float64))),
    )
    layer = StoredLayer((6, 4), sketch(BASE), changes)
    return StoredAdapter("mine", "lora", {"rank": 2}, 7, {"a.b": layer}, {"head": {"weight": torch.randn(3, 4)}})


def test_what_is_read_is_what_was_written(tmp_path):
    written = adapter()
    write_adapter(tmp_path / "x", written)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == sorted((SPEC, TENSORS))
    read = read_adapter(tmp_path / "x")
    assert (read.name, read.method, read.settings, read.seed) == ("mine", "lora", {"rank": 2}, 7)
    assert read.layers == written.layers  # maps compare by their tensors and dtypes
    assert torch.equal(read.trained["head"]["weight"], written.trained["head"]["weight"])
    with pytest.raises(EckartError, match="already holds something"):
        write_adapter(tmp_path / "x", written)


def grid(*shape: int) -> torch.Tensor:
    """Numbers that are exact in every dtype and on every machine."""
    return (torch.arange(math.prod(shape), dtype=torch.float32) * 0.375 - 1.5).reshape(shape)


def every_kind() -> StoredAdapter:
    """An adapter with a change of every kind, of stated numbers."""
    bits = packed(grid(6, 10) > 0)
    down = sparse_of(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 9]), grid(3), (2, 10))
    first, second = ({"up": grid(6, 2), "down": grid(2, 10)} for _ in range(2))
    routed = {"up": grid(6, 2), "bias": grid(2)}
    changes = (
        StoredChange(PLUS, Hadamard(LowRank(grid(6, 1), grid(1, 10)), Dense(grid(6, 10))), 0.1, 0.25),
        StoredChange(TIMES, Cayley(grid(5, 1), 2)),
        StoredChange(LEFT, Diagonal(grid(6))),
        StoredChange(RESCALED, Diagonal(grid(6)), frozen=("magnitude",)),
        StoredChange(MULTIPLIED, LowRank(grid(6, 2), grid(2, 10)), 0.5),
        StoredChange(GROUPED, scale=0.5, tensors={"of_columns": grid(3, 10), "of_rows": grid(6)}),
        StoredChange(MASKED, scale=2.0, tensors=first, numbers={"elastic": 1.0}, support=digest_of(bits)),
        StoredChange(MASKED, scale=2.0, tensors={**second, "bits": bits}, numbers={"elastic": 0.0}),
        StoredChange(KERNEL, tensors={"inputs": grid(2, 10, 3), "outputs": grid(2, 6, 3)}, numbers={"density": 0.1}),
        StoredChange(ROUTED, down, 0.5, 0.0, ("down.values",), routed, {"kept": 1.0, "balance": 1e-3}),
    )
    sketched = tuple(float(i) for i in range(16))
    return StoredAdapter("all", "lora", {"rank": 2}, 3, {"a.b": StoredLayer((6, 10), sketched, changes)}, {})


def same(a: StoredChange, b: StoredChange) -> bool:
    tensors = a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(a.tensors[key], b.tensors[key]) and a.tensors[key].dtype == b.tensors[key].dtype
        for key in a.tensors
    )
    return tensors and replace(a, tensors={}) == replace(b, tensors={})


def test_every_kind_is_read_as_the_first_version_wrote_it(tmp_path):
    """The golden folder must stay readable for good, and is written today byte for byte."""
    made, read = every_kind(), read_adapter(GOLDEN)
    assert {change.kind for change in made.layers["a.b"].changes} == set(KINDS)
    for mine, theirs in zip(made.layers["a.b"].changes, read.layers["a.b"].changes, strict=True):
        assert same(mine, theirs)
    write_adapter(tmp_path / "x", made)
    for name in (SPEC, TENSORS):
        assert (tmp_path / "x" / name).read_bytes() == (GOLDEN / name).read_bytes()


AT = lambda raw, i: raw["layers"]["a.b"]["changes"][i]  # noqa: E731
KIND_DAMAGES = {
    "no map": (lambda raw: AT(raw, 2).pop("map"), "a.b.2 lacks its map"),
    "a map too many": (lambda raw: AT(raw, 5).update(map=AT(raw, 2)["map"]), "a.b.5 has a map, which its kind has not"),
    "left of another side": (lambda raw: AT(raw, 1).update(change="left"), r"a map of shape \(6, 6\) belongs"),
    "no such tensor": (lambda raw: AT(raw, 5)["tensors"].pop("of_rows"), "has the tensors .'of_columns'. where"),
    "one too many": (lambda raw: AT(raw, 5)["tensors"].update(more=[1]), "has the tensors"),
    "described otherwise": (lambda raw: AT(raw, 5)["tensors"].update(of_rows=[5]), r"is \(6,\), described as \[5\]"),
    "another layer": (lambda raw: raw["layers"]["a.b"].update(shape=[10, 6]), "belongs"),
    "no number": (lambda raw: AT(raw, 8)["numbers"].pop("density"), r"has the numbers \[\] where .'density'"),
    "density": (lambda raw: AT(raw, 8)["numbers"].update(density=1.5), "density 1.5, which cannot be"),
    "elastic": (lambda raw: AT(raw, 6)["numbers"].update(elastic=0.5), "elastic 0.5"),
    "kept": (lambda raw: AT(raw, 9)["numbers"].update(kept=3), "kept 3.0, which cannot be"),
    "half kept": (lambda raw: AT(raw, 9)["numbers"].update(kept=1.5), "kept 1.5"),
    "balance": (lambda raw: AT(raw, 9)["numbers"].update(balance=math.nan), "balance nan"),
    "no support": (lambda raw: AT(raw, 6).pop("support"), "either the digest of the base's support or bits"),
    "two supports": (lambda raw: AT(raw, 7).update(support="0"), "either the digest"),
    "support of another kind": (lambda raw: AT(raw, 5).update(support="0"), "only if it is masked"),
    "dropout": (lambda raw: AT(raw, 4).update(dropout=0.5), "dropout 0.5"),
}
TENSOR_DAMAGES = {
    "rank": ("a.b.6.up", torch.zeros(6, 3), r"up is a tensor \(6, 3\) where|described"),
    "bits": ("a.b.7.bits", torch.zeros(6, 2), "dtype torch.float32"),
    "whole numbers": ("a.b.6.up", torch.zeros(6, 2, dtype=torch.int32), "dtype torch.int32"),
    "missing": ("a.b.9.bias", None, "a.b.9.bias is missing"),
    "no place": ("a.b.9.columns", torch.tensor([2, 0, 10], dtype=torch.int32), "columns beyond the matrix"),
}


@pytest.mark.parametrize("damage", [*KIND_DAMAGES, *TENSOR_DAMAGES])
def test_a_damaged_change_is_refused_in_one_sentence(damage, tmp_path):
    spec, message = KIND_DAMAGES.get(damage, (lambda raw: None, ""))

    def tensors(held: dict[str, torch.Tensor]) -> None:
        if damage in TENSOR_DAMAGES:
            name, tensor, _ = TENSOR_DAMAGES[damage]
            held.pop(name)
            if tensor is not None:
                held[name] = tensor

    with pytest.raises(EckartError, match=message or TENSOR_DAMAGES[damage][2]) as error:
        read_adapter(edited(tmp_path, spec, tensors, every_kind()))
    assert "\n" not in str(error.value)


def test_sizes_that_share_a_letter_are_equal(tmp_path):
    folder = edited(
        tmp_path,
        lambda raw: AT(raw, 6)["tensors"].update(down=[3, 10]),
        lambda held: held.update({"a.b.6.down": torch.zeros(3, 10)}),
        every_kind(),
    )
    with pytest.raises(EckartError, match=r"down is a tensor \(3, 10\) where one of shape \(2, 10\) belongs"):
        read_adapter(folder)


def edited(tmp_path, spec=lambda raw: None, tensors=lambda held: None, made=None):
    folder = tmp_path / "x"
    write_adapter(folder, made or adapter())
    raw, held = json.loads((folder / SPEC).read_text()), load_file(folder / TENSORS)
    spec(raw)
    tensors(held)
    (folder / SPEC).write_text(json.dumps(raw))
    save_file(held, folder / TENSORS)
    return folder


CHANGE = lambda raw: raw["layers"]["a.b"]["changes"][0]  # noqa: E731
DAMAGES = {
    "later format": (lambda raw: raw.update(format=2), "has the format 2, and this version of eckart reads 1"),
    "no layers": (lambda raw: raw.update(layers={}), "it adapts no layer"),
    "layers of another kind": (lambda raw: raw.update(layers=[1]), "is damaged"),
    "no method": (lambda raw: raw.pop("method"), "is damaged .'method'"),
    "unknown change": (lambda raw: CHANGE(raw).update(change="minus"), "kind 'minus'; this version knows plus, times"),
    "unknown map": (lambda raw: CHANGE(raw)["map"].update(op="Magic"), "unknown map 'Magic'"),
    "other shape in spec": (lambda raw: CHANGE(raw)["map"].update(up=[6, 3]), "is damaged"),
    "change in the wrong place": (lambda raw: CHANGE(raw).update(change="times"), r"a map of shape \(4, 4\) belongs"),
    "lengths that are no diagonal": (lambda raw: CHANGE(raw).update(change="rescaled"), "belongs"),
    "dropout": (lambda raw: CHANGE(raw).update(dropout=1.5), "dropout 1.5"),
    "scale": (lambda raw: CHANGE(raw).update(scale=math.inf), "scale inf"),
    "short sketch": (lambda raw: raw["layers"]["a.b"]["sketch"].pop(), "sketch of 15 numbers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_refused(damage, tmp_path):
    spec, message = DAMAGES[damage]
    with pytest.raises(EckartError, match=message):
        read_adapter(edited(tmp_path, spec=spec))


def test_damaged_tensors_are_refused(tmp_path):
    for i, (change, message) in enumerate(
        (
            (lambda held: held.pop("a.b.0.up"), "the tensor a.b.0.up is missing"),
            (lambda held: held.update({"a.b.0.up": torch.zeros(5, 2)}), "is damaged"),
            (lambda held: held.update({"a.b.0.up": torch.zeros(6, 2, dtype=torch.int32)}), "a floating dtype"),
            (
                lambda held: held.update({"more": torch.zeros(1)}),
                "holds more, which eckart_adapter.json does not mention",
            ),
        )
    ):
        with pytest.raises(EckartError, match=message):
            read_adapter(edited(tmp_path / str(i), tensors=change))
    folder = edited(tmp_path)
    data = (folder / TENSORS).read_bytes()
    for content in (data[:-10], data[:20], b""):
        (folder / TENSORS).write_bytes(content)
        with pytest.raises(EckartError, match="cannot be read"):
            read_adapter(folder)
    (folder / SPEC).write_text("{")
    with pytest.raises(EckartError, match="cannot be read"):
        read_adapter(folder)
    (folder / SPEC).write_text("[]")
    with pytest.raises(EckartError, match="should hold a JSON object, got a list"):
        read_adapter(folder)


def test_a_sketch_moves_as_little_as_its_matrix():
    generator = torch.Generator().manual_seed(0)
    for m, n in ((64, 64), (48, 256), (300, 40)):
        weight, other = (torch.randn(m, n, generator=generator) for _ in range(2))
        own = torch.tensor(sketch(Dense(weight)))

        def share(matrix: torch.Tensor, own: torch.Tensor = own) -> float:
            return float((torch.tensor(sketch(Dense(matrix))) - own).norm() / own.norm())

        assert share(weight.bfloat16()) < 0.02
        assert 0.02 < share(weight + 0.1 * other) < 0.3
        assert share(other) > 0.9
        assert sketch(LowRank(weight, torch.eye(n))) == pytest.approx(own.tolist(), abs=1e-2)


def lora(**changes) -> PeftAdapter:
    torch.manual_seed(2)
    layers = {
        f"h.{i}.fc": {"lora_A.weight": torch.randn(r, 4), "lora_B.weight": torch.randn(6, r)}
        for i, r in enumerate((2, 2, 3))
    }
    return PeftAdapter("LORA", layers, {"h.0.fc": 4.0, "h.1.fc": 4.0, "h.2.fc": 5.5}, 0.1, **changes)


def test_a_peft_folder_is_read_as_written(tmp_path):
    write_peft(tmp_path / "x", lora(), ["h.0.fc", "h.1.fc", "h.2.fc", "fc.more"], base="org/model", causal=True)
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    assert config["target_modules"] == ["fc"]
    assert (config["r"], config["rank_pattern"]) == (2, {"^h.2.fc": 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {"^h.2.fc": 5.5})
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "org/model")
    read = read_peft(tmp_path / "x")
    assert read.scale("h.2.fc") == 5.5 / 3
    assert read.dropout == 0.1
    for layer, own in lora().layers.items():
        assert all(torch.equal(read.layers[layer][key], tensor) for key, tensor in own.items())
    for size in range(2, 40):
        assert block_size(torch.zeros(1, size * (size - 1) // 2)) == size


PEFT_DAMAGES = {
    "rank": (lambda raw: raw.update(r=5), "h.0.fc has rank 2, but the config says 5"),
    "no rank": (lambda raw: raw.update(r=0), "the config says 0"),
    "pattern": (lambda raw: raw.update(rank_pattern={"(": 1}), "is damaged"),
    "type": (lambda raw: raw.update(peft_type=None), "PEFT's type None; eckart reads LORA, MISS, HRA, OFT"),
    "later variant": (lambda raw: raw.update(use_magic=True), "says use_magic=True, which eckart cannot express"),
    "alpha": (lambda raw: raw.update(lora_alpha="much"), "is damaged"),
    "dropout": (lambda raw: raw.update(lora_dropout=2), "is damaged .dropout 2"),
    "no magnitudes": (lambda raw: raw.update(use_dora=True), "use_dora is True .* tensors of h.0.fc do not fit"),
}


@pytest.mark.parametrize("damage", PEFT_DAMAGES)
def test_a_damaged_config_is_refused(damage, tmp_path):
    change, message = PEFT_DAMAGES[damage]
    write_peft(tmp_path / "x", lora(), [])
    raw = json.loads((tmp_path / "x" / CONFIG).read_text())
    change(raw)
    (tmp_path / "x" / CONFIG).write_text(json.dumps(raw))
    with pytest.raises(EckartError, match=message):
        read_peft(tmp_path / "x")


def test_tensors_that_are_not_peft_s_are_refused(tmp_path):
    write_peft(tmp_path / "x", lora(), [])
    path = tmp_path / "x" / PEFT_TENSORS
    held = load_file(path)
    key = "base_model.model.h.0.fc.lora_A.weight"
    for changed, message in (
        ({k: t for k, t in held.items() if k != key}, f"lacks {key}"),
        ({**held, "h.0.fc.weight": torch.zeros(1)}, "not named as PEFT names"),
        ({**held, key: torch.zeros(2, 4, 1, 1)}, "which no linear layer's tensor has"),
        ({"base_model.model.h.weight": torch.zeros(1)}, "adapts no linear layer with LORA"),
    ):
        save_file(changed, path)
        with pytest.raises(EckartError, match=message):
            read_peft(tmp_path / "x")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(EckartError, match="cannot be read"):
        read_peft(tmp_path / "x")
    path.unlink()
    with pytest.raises(EckartError, match="cannot be read"):
        read_peft(tmp_path / "x")
