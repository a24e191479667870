"""Folders with saved adapters: measured on their model, and written as one model of the same outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
)

import eckart
from eckart.errors import EckartError

DEMO = Path(eckart.__file__).parent / "demo"
MODEL, TEXT = DEMO / "stories260k", DEMO / "train.txt"
IDS = torch.arange(3, 60).reshape(3, 19)


def moved(model: torch.nn.Module, seed: int = 0, by: float = 0.05) -> torch.nn.Module:
    """Move what trains away from its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=by)
    return model


def saved(base: Path, out: Path, method: str = "lora", form: str = "eckart", **settings: object) -> torch.Tensor:
    """Save an adapter of a folder's model; return the logits with it."""
    model = moved(eckart.adapt(eckart.load(base, dtype="auto").eval(), method, **settings))
    eckart.adapters(model).save(out, format=form)
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS % model.config.vocab_size).logits.float()


@pytest.mark.parametrize("method", ["dora", "hra", "s2ft", "miss", "tlora"])
def test_a_folded_model_computes_what_the_adapted_one_does(tmp_path: Path, method: str):
    wanted = saved(MODEL, tmp_path / "a", method)
    done = eckart.fold_adapters(MODEL, tmp_path / "a", tmp_path / "whole")
    assert max(done.lost.values()) < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert "quantization_config" not in json.loads((tmp_path / "whole/config.json").read_text())
    assert done.nbytes == sum(t.numel() * 4 for t in set(plain.parameters()))
    torch.testing.assert_close(logits(plain), wanted, atol=2e-4, rtol=1e-4)
    assert (tmp_path / "whole/tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


def test_several_adapters_are_composed_in_their_order(tmp_path: Path):
    model = eckart.load(MODEL, dtype="auto").eval()
    for name, method in (("one", "oft"), ("two", "dora")):
        settings = {"block": 4} if method == "oft" else {"rank": 4}
        moved(eckart.adapt(model, method, name=name, **settings), len(name))
        eckart.adapters(model).save(tmp_path / name, name)
    found = {}
    for order in (("one", "two"), ("two", "one")):
        eckart.adapters(model).use(*order)
        wanted = logits(model)
        eckart.fold_adapters(MODEL, [tmp_path / name for name in order], tmp_path / "-".join(order))
        found[order] = logits(eckart.load(tmp_path / "-".join(order)).eval())
        torch.testing.assert_close(found[order], wanted, atol=2e-4, rtol=1e-4)
    assert (found["one", "two"] - found["two", "one"]).abs().max() > 1e-2


def test_an_adapter_of_peft_is_folded_alike(tmp_path: Path):
    wanted = saved(MODEL, tmp_path / "a", "dora", form="peft", rank=4)
    eckart.fold_adapters(MODEL, tmp_path / "a", tmp_path / "whole")
    torch.testing.assert_close(logits(eckart.load(tmp_path / "whole").eval()), wanted, atol=2e-4, rtol=1e-4)


def test_weights_keep_their_dtype(tmp_path: Path):
    base = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).save_pretrained(base)
    saved(base, tmp_path / "a")
    eckart.fold_adapters(base, tmp_path / "a", tmp_path / "whole")
    assert eckart.load(tmp_path / "whole", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("svd-llm", {}),
        ("eckart", {}),
        ("rtn", {"bits": 8}),
        ("modegpt", {}),
        ("oats", {"iterations": 2}),
        ("basis-sharing", {}),
    ],
)
def test_a_compressed_model_stays_compressed(tmp_path: Path, method: str, settings: dict[str, object]):
    small = tmp_path / "small"
    keep = None if method == "rtn" else 0.7
    eckart.compress(MODEL, small, method=method, keep=keep, calibration=TEXT, samples=8, settings=settings, check=False)
    wanted = saved(small, tmp_path / "a", "lora", rank=4)
    before = eckart.show(small)
    text = tmp_path / "some.txt"
    text.write_text(TEXT.read_text()[:20_000])
    done = eckart.fold_adapters(small, tmp_path / "a", tmp_path / "whole", calibration=text, length=64)
    after = eckart.show(tmp_path / "whole")
    assert {layer.name for layer in after.layers} == {layer.name for layer in before.layers}
    whole = eckart.load(tmp_path / "whole").eval()
    if method in ("eckart", "modegpt", "oats"):  # sums, and dense layers, hold any change
        assert max(done.lost.values()) < 1e-4
        torch.testing.assert_close(logits(whole), wanted, atol=2e-3, rtol=1e-3)
    else:
        handle = eckart.adapters(eckart.load_adapter(eckart.load(small).eval(), tmp_path / "a"))
        windows = torch.tensor(PreTrainedTokenizerFast.from_pretrained(MODEL)(text.read_text())["input_ids"])
        assert max(done.lost.values()) > 1e-3
        assert (logits(whole) - wanted).abs().mean() < (logits(handle.remove()) - wanted).abs().mean()
        assert len(windows) > 64 * 64  # enough text for the windows that layers are fitted on


@pytest.mark.parametrize("block", [0, 1])
def test_what_is_shared_and_not_folded_is_still_stored_once(tmp_path: Path, block: int):
    small = tmp_path / "small"
    eckart.compress(MODEL, small, method="basis-sharing", keep=0.7, calibration=TEXT, samples=8, check=False)
    before = json.loads((small / "config.json").read_text())["quantization_config"]["layers"]
    owner, taking = (
        f"model.layers.{block}.self_attn.q_proj",
        {k: v["shared"] for k, v in before.items() if "shared" in v},
    )
    model = moved(eckart.adapt(eckart.load(small).eval(), "lora", rank=2, targets=[owner]))
    eckart.adapters(model).save(tmp_path / "a")
    wanted = logits(eckart.adapters(model).fold())
    eckart.fold_adapters(small, tmp_path / "a", tmp_path / "whole")
    whole = eckart.load(tmp_path / "whole").eval()
    assert torch.equal(logits(whole), wanted)
    after = json.loads((tmp_path / "whole/config.json").read_text())["quantization_config"]["layers"]
    changed = {name for name, taken in taking.items() if after[name].get("shared") != taken}
    assert changed  # the folded layer, or the one that took from it
    assert all(name == owner or owner in taking[name].values() for name in changed)
    whole.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(eckart.load(tmp_path / "again").eval()), wanted)


def test_a_fold_on_a_text_is_nearer_there_than_one_without(tmp_path: Path):
    small, text = tmp_path / "small", tmp_path / "some.txt"
    eckart.compress(MODEL, small, method="svd-llm", keep=0.6, calibration=TEXT, samples=8, check=False)
    saved(small, tmp_path / "a", rank=4)
    text.write_text(TEXT.read_text()[:20_000])
    lost, away = [], []
    for name, calibration in (("plain", None), ("near", text)):
        done = eckart.fold_adapters(small, tmp_path / "a", tmp_path / name, calibration=calibration, length=64)
        lost.append(done.lost)
        away.append(logits(eckart.load(tmp_path / name).eval()))
    assert lost[0] != lost[1]
    assert (away[0] - away[1]).abs().max() > 1e-3
    model = eckart.adapters(eckart.load_adapter(eckart.load(small).eval(), tmp_path / "a"))
    rows = torch.tensor(PreTrainedTokenizerFast.from_pretrained(MODEL)(text.read_text())["input_ids"])[: 64 * 16]
    ids = rows.reshape(16, 64)
    with torch.no_grad():
        full = model.model(ids).logits
        errors = [(eckart.load(tmp_path / n).eval()(ids).logits - full).square().mean() for n in ("plain", "near")]
    assert errors[1] < errors[0]


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[Path, Path]:
    """A DistilBERT without a head, whose classifier has two new layers, and labelled rows."""
    folder, rows = tmp_path / "encoder", tmp_path / "rows.jsonl"
    vocabulary = json.loads((MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(vocabulary), dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64,
        dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    DistilBertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    words = [(w, o) for o in ("house", "tree", "sea") for w in ("dog", "cat", "bird")]
    lines = [json.dumps({"text": f"the {w} ran to the {o}", "label": w}) for w, o in words * 6]
    rows.write_text("\n".join(lines))
    return folder, rows


def test_every_new_layer_of_a_head_is_saved_with_its_adapter(tmp_path: Path, encoder: tuple[Path, Path]):
    folder, rows = encoder
    done = eckart.tune(
        folder, rows, tmp_path / "a", method="lora", label_field="label", validation=rows, steps=40, rate=1e-2
    )
    torch.manual_seed(123)  # what is drawn anew must not matter
    found = eckart.evaluate(folder, labelled=rows, adapters=[tmp_path / "a"])
    assert found.nats_per_example == pytest.approx(done.after["loss"], abs=1e-4)
    assert found.accuracy == pytest.approx(done.after["accuracy"])
    assert found.accuracy > 0.9
    eckart.fold_adapters(folder, tmp_path / "a", tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert whole.config.id2label == {0: "bird", 1: "cat", 2: "dog"}
    assert eckart.evaluate(tmp_path / "whole", labelled=rows).nats_per_example == pytest.approx(
        done.after["loss"], abs=1e-4
    )
    assert eckart.evaluate(whole, labelled=rows).accuracy == found.accuracy


def test_heads_and_labels_that_do_not_fit_are_refused(tmp_path: Path, encoder: tuple[Path, Path]):
    folder, rows = encoder
    quick = {"method": "lora", "label_field": "label", "steps": 2}
    for name in ("a", "b"):
        eckart.tune(folder, rows, tmp_path / name, **quick)
    with pytest.raises(EckartError, match="both have a head, and a model has one"):
        eckart.fold_adapters(folder, [tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    with pytest.raises(EckartError, match="has no head for classes; give the adapter with one"):
        eckart.evaluate(folder, labelled=rows)
    two = tmp_path / "two.jsonl"
    two.write_text('{"text": "the dog", "label": "dog"}\n{"text": "the wolf", "label": "wolf"}\n')
    with pytest.raises(EckartError, match="has the label 'wolf'"):
        eckart.evaluate(folder, labelled=two, adapters=[tmp_path / "a"])
    (tmp_path / "a/report.json").unlink()  # classes without names are those of the file
    assert eckart.evaluate(folder, labelled=rows, adapters=[tmp_path / "a"]).examples == 54
    two.write_text('{"text": "the dog", "label": "dog"}\n{"text": "the cat", "label": "cat"}\n')
    with pytest.raises(EckartError, match="the labels cat, dog, but the model has 3 classes"):
        eckart.evaluate(folder, labelled=two, adapters=[tmp_path / "a"])


def test_what_cannot_be_folded_leaves_nothing(tmp_path: Path):
    saved(MODEL, tmp_path / "a")
    with pytest.raises(EckartError, match="give the folder of one adapter at least"):
        eckart.fold_adapters(MODEL, [], tmp_path / "whole")
    with pytest.raises(EckartError, match="already holds something"):
        eckart.fold_adapters(MODEL, tmp_path / "a", tmp_path / "a")
    with pytest.raises(EckartError, match="adapters are for a folder's model"):
        eckart.evaluate(eckart.load(MODEL), text=TEXT, adapters=[tmp_path / "a"])
    saved(MODEL, tmp_path / "routed", "flylora")
    with pytest.raises(EckartError):
        eckart.fold_adapters(MODEL, tmp_path / "routed", tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "routed"}
