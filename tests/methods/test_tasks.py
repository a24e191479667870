"""Adapters of many tasks on one model: sequences that keep what came before, and adapters combined into one."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import eckart
from eckart.errors import EckartError
from eckart.hosts import map_of
from eckart.maps import Masked
from eckart.methods.adapt.combining import combination

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 31, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(24).reshape(2, 12) % 31
TARGETS = ["q_proj", "up_proj"]


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def learn(model: nn.Module, ids: Tensor, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW(eckart.adapters(model).parameter_groups(3e-2, weight_decay=0.01))
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def sequence(tasks: int = 3, model: nn.Module | None = None) -> tuple[nn.Module, list[Tensor]]:
    """A model that learned tasks "0", "1", ... in turn, and its outputs right behind each."""
    model, out = model or llama(), []
    for task in range(tasks):
        after = None if task == 0 else str(task - 1)
        eckart.adapt(model, "incremental", name=str(task), rank=4, later=2, after=after, targets=TARGETS)
        losses = learn(model, IDS + task)
        assert losses[-1] < losses[0]
        out.append(logits(model))
    return model, out


def test_later_tasks_leave_earlier_ones_alone_to_the_bit():
    model, behind = sequence()
    handle = eckart.adapters(model)
    for task, wanted in enumerate(behind):
        handle.use(str(task))
        assert torch.equal(logits(model), wanted)
        assert handle.count() == 0 or task == 2  # what others build on does not train again
    alone = [row for wanted in behind for row in wanted[:1]]
    with handle.requests(["0", "1", "2", None]):
        mixed = logits(model, IDS[:1].repeat(4, 1))
    assert torch.allclose(mixed[:3], torch.stack(alone), atol=1e-5)
    with handle.off():
        assert torch.allclose(mixed[3], logits(model, IDS[:1])[0], atol=1e-5)


def test_a_later_task_trains_its_own_terms_and_weighs_all():
    model, _ = sequence()
    for layer in eckart.adapters(model).layers.values():
        m, n = layer.out_features, layer.in_features
        counts = [sum(p.numel() for p in layer.adapter(str(task)).trained()) for task in range(3)]
        assert counts == [0, 0, 2 * (m + n) + 4 + 2 + 2]
        first, last = (layer.adapter(name).chain()[0].delta for name in ("0", "2"))
        for i in (0, 2):  # one copy of U and V in memory, selectors of each task's own
            assert first.get_submodule(str(i)).weight.data_ptr() == last.get_submodule(str(i)).weight.data_ptr()
        assert not torch.equal(map_of(first).maps[1].scale, map_of(last).maps[1].scale)
        selectors = map_of(last).maps[1].scale
        assert bool((selectors != 0).any())  # the third task found use for the first one's terms


def test_a_task_starts_as_the_base_with_directions_of_its_own():
    model, _ = sequence(1)
    before = logits(llama())
    eckart.adapt(model, "incremental", name="1", rank=4, later=2, after="0", targets=TARGETS)
    assert torch.equal(logits(model), before)
    for layer in eckart.adapters(model).layers.values():
        old, new = (map_of(change.delta).maps for change in layer.adapter("1").chain())
        for i, along in ((0, 0), (2, 1)):
            fresh = new[i].weight if along == 0 else new[i].weight.mT
            assert torch.allclose(fresh.mT @ fresh, torch.eye(2), atol=1e-5)
            first = old[i].weight if along == 0 else old[i].weight.mT
            assert (first.mT @ fresh).norm(dim=0).max() < 0.95  # not drawn twice


def test_a_sequence_comes_back_from_files_and_goes_on(tmp_path: Path):
    model, behind = sequence(2)
    for task in ("0", "1"):
        eckart.adapters(model).save(tmp_path / task, task)
    again = llama()
    for task in ("0", "1"):
        eckart.load_adapter(again, tmp_path / task)
    handle = eckart.adapters(again)
    for task in (0, 1):
        handle.use(str(task))
        assert torch.equal(logits(again), behind[task])
    eckart.adapt(again, "incremental", name="2", rank=4, later=2, after="1", targets=TARGETS)
    learn(again, IDS + 2)
    eckart.adapt(model, "incremental", name="2", rank=4, later=2, after="1", targets=TARGETS)
    learn(model, IDS + 2)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("incremental", {"after": "none"}, "no adapter is called 'none'"),
        ("lora", {"after": "0"}, "lora builds on no earlier adapter; leave after out, or take incremental"),
        ("incremental", {"after": "plain"}, "incremental builds on adapters of its own kind, and 'plain' is of lora"),
        ("incremental", {"after": "0", "targets": ["q_proj"]}, "must be on the same layers"),
        ("incremental", {"after": "0", "trained": ["lm_head"]}, "would train whole and change what '0' computes"),
        ("incremental", {"later": 0}, "later must be at least 1"),
    ],
)
def test_what_would_not_keep_the_promise_is_refused(method: str, options: dict, words: str):
    model, _ = sequence(1)
    eckart.adapt(model, "lora", name="plain", rank=2, targets=TARGETS)
    names = eckart.adapters(model).names
    with pytest.raises(EckartError, match=words):
        eckart.adapt(model, method, name="new", **{"targets": TARGETS, **options})
    assert eckart.adapters(model).names == names
    eckart.adapters(model).use("0")
    assert eckart.adapters(model).count() > 0


def test_a_head_of_transformers_is_refused_for_a_later_task():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=2)).eval()
    eckart.adapt(model, "incremental", name="0", rank=4)
    with pytest.raises(EckartError, match="score would train whole"):
        eckart.adapt(model, "incremental", name="1", rank=4, after="0")
    eckart.adapt(model, "incremental", name="1", rank=4, after="0", trained=())


def several(methods: dict[str, str]) -> nn.Module:
    """A model with random adapters by name."""
    model = llama()
    for i, (name, method) in enumerate(methods.items()):
        size = {"block": 8} if method == "oft" else {"rank": 4}
        eckart.adapt(model, method, name=name, targets=TARGETS, seed=i, **size)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for layer in eckart.adapters(model).layers.values():
                for parameter in layer.adapter(name).trained():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def changes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter makes of every weight, in float64."""
    out = {}
    for layer, module in eckart.adapters(model).layers.items():
        base = map_of(module.base).to(torch.float64)
        out[layer] = (module.adapter(name).to(torch.float64).of(base).dense() - base.dense()).detach()
        module.adapter(name).to(torch.float32)
    return out


METHODS = {"a": "lora", "b": "dora", "c": "oft"}


def brute_force(how: str, own: list[Tensor]) -> list[Tensor]:
    if how == "sum":
        return [sum(own)]
    if how == "mean":
        return [sum(own) / len(own)]
    if how == "task-masks":
        total = sum(own)
        return [torch.where(t.abs() > 0.6 * (total - t).abs(), total, 0.0) for t in own]
    out = torch.zeros_like(own[0])
    trimmed = []
    for t in own:
        least = t.abs().flatten().sort(descending=True).values[round(0.2 * t.numel()) - 1]
        trimmed.append(torch.where(t.abs() >= least, t, 0.0))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            entries = [float(t[i, j]) for t in trimmed if t[i, j] != 0]
            sign = 1 if sum(entries) > 0 else -1
            agreeing = [e for e in entries if e * sign > 0]
            out[i, j] = sum(agreeing) / max(1, len(agreeing))
    return [out]


@pytest.mark.parametrize("how", ["sum", "mean", "ties", "task-masks"])
def test_combined_adapters_are_what_the_formula_says(how: str):
    model = several(METHODS)
    handle = eckart.adapters(model)
    before = handle.names
    new = handle.combine("a", "b", "c", how=how, into="all")
    assert new == (["all:a", "all:b", "all:c"] if how == "task-masks" else ["all"])
    assert handle.names == [*before, *new]
    own = [changes(model, name) for name in METHODS]
    for i, name in enumerate(new):
        for layer, got in changes(model, name).items():
            wanted = brute_force(how, [one[layer] for one in own])[i]
            far = (got - wanted).abs() > 1e-5
            assert int(far.sum()) <= 2  # an entry at the threshold may fall to either side
    handle.use(new[0])
    assert handle.count() == 0
    moved = logits(model)
    assert max(handle.merge().values()) < 1e-4
    assert torch.allclose(logits(model), moved, atol=1e-4)
    handle.unmerge()


def test_masks_take_a_bit_per_weight_and_share_the_rest():
    model = several({"a": "lora", "b": "lora"})
    handle = eckart.adapters(model)
    names = handle.combine("a", "b")
    for module in handle.layers.values():
        first, second = (map_of(module.adapter(name).chain()[0].delta) for name in names)
        assert isinstance(first, Masked)
        assert isinstance(second, Masked)
        m, n = first.shape
        assert first.mask.dtype == torch.uint8
        assert first.mask.numel() == m * -(-n // 8)
        assert first.map.weight.data_ptr() == second.map.weight.data_ptr()
    alone = []
    for name in names:
        handle.use(name)
        alone.append(logits(model, IDS[:1])[0])
    with handle.requests([*names, None]):
        assert torch.allclose(logits(model, IDS[:1].repeat(3, 1))[:2], torch.stack(alone), atol=1e-5)


def test_combined_adapters_come_back_from_files(tmp_path: Path):
    model = several({"a": "lora", "b": "lora"})
    handle = eckart.adapters(model)
    for i, name in enumerate([*handle.combine("a", "b"), *handle.combine("a", "b", how="ties", into="t", density=0.5)]):
        handle.use(name)
        handle.save(tmp_path / str(i), name)
        again = eckart.load_adapter(llama(), tmp_path / str(i))
        assert torch.equal(logits(again), logits(model))
        assert eckart.adapters(again).names == [name]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), tasks=st.integers(2, 4), threshold=st.floats(0.0, 3.0))
def test_a_mask_keeps_where_the_task_is_large_beside_the_others(seed: int, tasks: int, threshold: float):
    generator = torch.Generator().manual_seed(seed)
    own = [torch.randn(3, 11, generator=generator, dtype=torch.float64) for _ in range(tasks)]
    made = combination("task-masks", {"threshold": threshold}).combine(own)
    for change, masked in zip(own, made, strict=True):
        others = (sum(own) - change).abs()
        kept = masked.dense() != 0
        assert bool((change.abs()[kept] > threshold * others[kept]).all())
        assert bool((change.abs()[~kept] <= threshold * others[~kept]).all())
        assert torch.allclose(masked.dense()[kept], sum(own)[kept])


def test_what_cannot_be_combined_is_refused_and_adds_nothing():
    model = several({"a": "lora", "b": "lora"})
    eckart.adapt(model, "flylora", name="fly", rank=4, kept=2, targets=TARGETS)
    handle = eckart.adapters(model)
    names = handle.names
    for arguments, options, words in (
        (("a",), {}, "two different adapters"),
        (("a", "a"), {}, "two different adapters"),
        (("a", "x"), {}, "no adapter is called 'x'"),
        (("a", "b"), {"how": "masks"}, "did you mean 'task-masks'"),
        (("a", "b"), {"density": 0.1}, "task-masks has no setting 'density'"),
        (("a", "b"), {"how": "ties", "density": 0.0}, "density must be above 0"),
        (("a", "b"), {"threshold": -1.0}, "threshold must not be negative"),
        (("a", "b"), {"how": "sum", "into": "a"}, "called 'a' already"),
        (("a", "fly"), {}, "depends on its input"),
    ):
        with pytest.raises(EckartError, match=words):
            handle.combine(*arguments, **options)
        assert handle.names == names
        assert all(set(layer.adapters) == set(names) for layer in handle.layers.values())
    with pytest.raises(EckartError, match="task-masks combines adapters that are there"):
        eckart.adapt(llama(), "task-masks")
