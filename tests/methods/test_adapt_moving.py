"""What methods do between optimizer steps: what it computes, that it changes no function, and in whose loops."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import eckart
from eckart.errors import EckartError
from eckart.hosts import map_of
from eckart.maps import Dense, LowRank, Sparse
from eckart.methods.adapt import between as following
from eckart.methods.adapt import tune as tuning

DEMO = Path(eckart.__file__).parent / "demo"
IDS = torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(1))
MOVING = {
    "switchlora": {"rank": 3, "interval": 10.0, "ratio": 1.0},
    "lift": {"rank": 2, "budget": 2, "refresh": 3},
    "sara": {"threshold": 5e-3},
}
every = pytest.mark.parametrize("method", MOVING)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(method: str, **changes: Any) -> nn.Module:
    return eckart.adapt(base(), method, **{**MOVING[method], **changes})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def disturb(model: nn.Module, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in eckart.adapters(model).layers.values():
            for parameter in layer.adapter("default").trained():
                parameter += size * torch.randn(parameter.shape, generator=generator)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(eckart.adapters(model).parameter_groups(rate, weight_decay=0.0))


def run(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss  # lives until the next one is there, as in any loop
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters of every layer as they are."""
    layers = eckart.adapters(model).layers
    return {
        f"{at} {i}": p.detach().clone()
        for at, layer in layers.items()
        for i, p in enumerate(layer.adapter("default").trained())
    }


@every
def test_a_state_that_has_moved_is_loaded_and_gone_on_from(method: str):
    """As torch saves and loads it, the shapes of what moved being those of a later step."""
    whole = adapted(method)
    optimizer = optimizer_of(whole, 1e-2)
    eckart.adapters(whole).follow(optimizer, 9)
    run(whole, optimizer, 7)
    state, moments_then = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(whole, optimizer, 2)
    later = adapted(method)
    own = optimizer_of(later, 1e-2)
    eckart.adapters(later).follow(own, 9)
    later.load_state_dict(state)
    own.load_state_dict(moments_then)
    run(later, own, 2)
    assert whole.state_dict().keys() == later.state_dict().keys()
    assert all(torch.equal(tensor, later.state_dict()[name]) for name, tensor in whole.state_dict().items())


@every
def test_what_moves_changes_no_function(method: str):
    """A rate of zero leaves what moves between the steps."""
    model = adapted(method)
    disturb(model)
    before, start = logits(model), trained(model)
    optimizer = optimizer_of(model, 0.0)
    eckart.adapters(model).follow(optimizer, 8)
    run(model, optimizer, 8)
    assert (logits(model) - before).abs().max() < 1e-5
    moved = trained(model)
    assert any(moved[at].shape != start[at].shape or not torch.equal(moved[at], start[at]) for at in start)


@every
def test_without_being_followed_nothing_moves(method: str):
    model = adapted(method)
    start, optimizer = trained(model), optimizer_of(model, 0.0)
    run(model, optimizer, 8)
    after = trained(model)
    assert all(torch.equal(after[at], start[at]) for at in start)


@every
def test_what_moved_saves_loads_merges_and_is_taken_off(method: str, tmp_path: Path):
    model = adapted(method)
    optimizer = optimizer_of(model, 3e-3)
    eckart.adapters(model).follow(optimizer, 8)
    run(model, optimizer, 8)
    moved, handle = logits(model), eckart.adapters(model)
    handle.save(tmp_path / "adapter")
    loaded = eckart.load_adapter(base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), moved)
    again = optimizer_of(loaded, 0.0)  # what moved already moves on
    eckart.adapters(loaded).follow(again, 8)
    run(loaded, again, 8)
    assert (logits(loaded) - moved).abs().max() < 1e-5
    assert max(handle.merge().values()) < 1e-4
    assert torch.allclose(logits(model), moved, atol=1e-4)
    handle.unmerge()
    assert torch.equal(logits(model), moved)
    state, wanted = handle.remove().state_dict(), base().state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@every
def test_a_stopped_fine_tune_ends_in_the_same_bytes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"method": method, "settings": MOVING[method], "steps": 12, "batch": 4, "length": 16, "rate": 3e-3}
    course = tuning.Course
    monkeypatch.setattr(tuning, "Course", lambda *args: course(*args, save_every=4))
    eckart.tune(DEMO / "stories260k", DEMO / "train.txt", tmp_path / "whole", **options)

    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 10:
            raise StoppedError

    with pytest.raises(StoppedError):
        eckart.tune(DEMO / "stories260k", DEMO / "train.txt", tmp_path / "parts", progress=stop, **options)
    seen: list[int] = []
    eckart.tune(
        DEMO / "stories260k", DEMO / "train.txt", tmp_path / "parts",
        progress=lambda stage, done, total: seen.append(done), **options,
    )  # fmt: skip
    assert min(seen) == 8
    for name in ("adapter.safetensors", "eckart_adapter.json", "report.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("method", "steps"), [("switchlora", 400), ("lift", 12)])
def test_peft_s_format_is_refused_before_the_first_step(method: str, steps: int, tmp_path: Path):
    """These would end as what PEFT has no type for."""
    settings = {"switchlora": {"rank": 3, "interval": 10.0, "ratio": 9.0}}
    seen: list[int] = []
    with pytest.raises(EckartError, match="PEFT has no type for Plus"):
        eckart.tune(
            DEMO / "stories260k", DEMO / "train.txt", tmp_path / "out", method=method, format="peft", steps=steps,
            batch=1, length=16, settings=settings.get(method, MOVING[method]),
            progress=lambda stage, done, total: seen.append(done if stage == "train" else 0),
        )  # fmt: skip
    assert not any(seen)


@every
def test_the_trainer_of_transformers_is_followed(method: str, tmp_path: Path):
    model, plain = adapted(method), adapted(method)
    optimizer, other = optimizer_of(model, 1e-3), optimizer_of(plain, 1e-3)
    eckart.adapters(model).follow(optimizer, 8)
    eckart.adapters(plain).follow(other, 8)
    run(plain, other, 8)
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    Trainer(model=model, args=options, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert (logits(model.eval()) - logits(plain)).abs().max() < 1e-3  # eight steps, as if of whole batches
    shapes = {at: value.shape for at, value in trained(plain).items()}
    assert {at: value.shape for at, value in trained(model).items()} == shapes


def test_accelerate_s_optimizers_and_other_ones_are_followed():
    model = adapted("lift")
    start, accelerator = places(model), Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(eckart.adapters(model).parameter_groups(0.1), momentum=0.9))
    eckart.adapters(model).follow(optimizer, 8)
    run(model, optimizer, 8)
    assert any(not torch.equal(after, start[at]) for at, after in places(model).items())


def test_a_method_that_does_not_move_may_be_followed():
    model = eckart.adapt(base(), "lora", rank=2)
    optimizer = optimizer_of(model, 1e-3)
    eckart.adapters(model).follow(optimizer, 2)
    run(model, optimizer, 3)
    assert eckart.adapters(model).moving() == []


def test_an_adapter_that_is_not_active_or_dropped_moves_no_more():
    model = adapted("lift")
    start, optimizer, handle = places(model), optimizer_of(model, 0.1), eckart.adapters(model)
    run(model, optimizer, 1)
    handle.follow(optimizer, 8)
    handle.use()
    for _ in range(4):
        optimizer.step()
    assert all(torch.equal(where, start[at]) for at, where in places(model).items())
    handle.drop("default")
    optimizer.step()


def test_optimizers_that_cannot_be_followed_are_refused():
    model = adapted("switchlora")
    handle, optimizer = eckart.adapters(model), optimizer_of(model, 1e-3)
    with pytest.raises(EckartError, match="only an optimizer of torch can be followed, got a Linear"):
        handle.follow(nn.Linear(1, 1), 5)
    with pytest.raises(EckartError, match="steps must be at least 1, got 0"):
        handle.follow(optimizer, 0)
    with pytest.raises(EckartError, match="does not train the adapter 'default'"):
        handle.follow(torch.optim.AdamW(nn.Linear(2, 2).parameters()), 5)
    followed = handle.follow(optimizer, 5)
    with pytest.raises(EckartError, match="is followed already"):
        handle.follow(optimizer, 5)
    followed.remove()
    handle.follow(optimizer, 5)


@pytest.mark.parametrize(
    ("method", "settings", "sentence"),
    [
        ("switchlora", {"interval": 8.0}, "interval must be at least 1 and twice wait"),
        ("switchlora", {"rank": 2, "ratio": 0.0}, "ratio positive"),
        ("lift", {"refresh": -1}, "refresh not negative, got 128 and -1"),
        ("sara", {"progressive": 1.0}, "progressive must be at least 0 and below 1, got 1.0"),
    ],
)
def test_settings_out_of_range_are_one_sentence(method: str, settings: dict[str, Any], sentence: str):
    with pytest.raises(EckartError, match=sentence):
        eckart.adapt(base(), method, **settings)


# SwitchLoRA.


class Reference:
    """Columns of B and rows of A with an AdamW each, which is made anew where they start anew; W is changed itself."""

    def __init__(self, weight: Tensor, up: Tensor, down: Tensor, scale: float, rate: float) -> None:
        self.weight, self.scale, self.rate = weight - scale * up @ down, scale, rate
        self.columns = [nn.Parameter(column.clone()) for column in up.mT]
        self.rows = [nn.Parameter(row.clone()) for row in down]
        self.optimizers = {id(p): self.fresh(p) for p in (*self.columns, *self.rows)}
        self.resting = dict.fromkeys(self.optimizers, 0)

    def fresh(self, parameter: nn.Parameter) -> torch.optim.AdamW:
        return torch.optim.AdamW([parameter], lr=self.rate, weight_decay=0.0)

    def whole(self) -> Tensor:
        terms = [torch.outer(b, a) for b, a in zip(self.columns, self.rows, strict=True)]
        return self.weight + self.scale * torch.stack(terms).sum(0)

    def step(self, loss: Any) -> None:
        loss(self.whole()).backward()
        for p in (*self.columns, *self.rows):
            if self.resting[id(p)] == 0:
                self.optimizers[id(p)].step()
            else:
                self.resting[id(p)] -= 1
            p.grad = None

    @torch.no_grad()
    def switch(self, own: nn.Parameter, other: nn.Parameter, to: Tensor) -> None:
        """Take over another vector; its counterpart starts anew after five steps."""
        before = self.whole()
        own.copy_(to)
        self.weight += before - self.whole()
        self.optimizers[id(other)], self.resting[id(other)] = self.fresh(other), 5


@pytest.mark.parametrize(("rank", "kind"), [(2, LowRank), (6, Dense)])
def test_switchlora_is_the_paper_s_algorithm(rank: int, kind: type):
    m, n, steps, rate, interval, ratio = 20, 16, 30, 1e-2, 10.0, 0.5
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(n, m, bias=False)}).double()
    target = torch.randn(m, n, dtype=torch.float64)
    eckart.adapt(model, "switchlora", targets=["layer"], rank=rank, interval=interval, ratio=ratio)
    layer = eckart.adapters(model).layers["layer"]
    layer.adapter("default").double()
    fold, plus = layer.adapter("default").chain()
    up, down = plus.delta.up.weight, plus.delta.down.weight
    assert float(down.detach().abs().max()) <= math.sqrt(3) * (rank * m**0.5 / n**1.5) ** 0.25 * 3**-0.25
    reference = Reference(layer.base.weight.detach(), up.detach(), down.detach(), 1 / rank, rate)
    optimizer = optimizer_of(model, rate)
    eckart.adapters(model).follow(optimizer, steps)
    layer.adapter("default").double()
    assert isinstance(map_of(fold.delta), kind)

    def loss(weight: Tensor) -> Tensor:
        return (weight - target).square().mean()

    switched, seen = 0, list(torch.cat([up.detach().mT], 0))
    for _ in range(steps):
        loss(layer(torch.eye(n, dtype=torch.float64)).mT).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step(loss)
        for own, other, now in (
            *zip(reference.columns, reference.rows, up.detach().mT, strict=True),
            *zip(reference.rows, reference.columns, down.detach(), strict=True),
        ):
            if (own - now).abs().max() > 5 * rate:
                switched += 1
                seen += [now.clone()] if now.shape[0] == m else []
                reference.switch(own, other, now)
        torch.testing.assert_close(up.detach(), torch.stack(reference.columns, 1).detach(), atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(down.detach(), torch.stack(reference.rows).detach(), atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(layer.held_map().dense(), reference.whole(), atol=1e-9, rtol=1e-7)
    due = sum(rank / interval * 0.3 ** ((t + 1) / (ratio * steps)) for t in range(steps))
    assert abs(switched / 2 - due) <= 1
    assert switched >= 2
    assert torch.linalg.matrix_rank(layer.held_map().dense() - layer.base.weight) > rank


def test_switched_vectors_are_of_the_start_s_size_and_come_back():
    """With two spare vectors, and no learning, only those that were there from the start are ever in use."""
    model = nn.ModuleDict({"layer": nn.Linear(24, 20, bias=False)})
    eckart.adapt(model, "switchlora", targets=["layer"], rank=18, interval=10.0, ratio=100.0)
    layer = eckart.adapters(model).layers["layer"]
    up = layer.adapter("default").chain()[1].delta.up.weight
    optimizer = optimizer_of(model, 0.0)
    eckart.adapters(model).follow(optimizer, 60)
    seen: set[tuple[float, ...]] = set()
    for _ in range(60):
        layer(torch.ones(1, 24)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen |= {tuple(column.tolist()) for column in up.detach().mT}
    assert len(seen) == 20  # min(m, n)


# Supports.


def places(model: nn.Module) -> dict[str, Tensor]:
    """Return where values train, in every layer."""
    out = {}
    for at, layer in eckart.adapters(model).layers.items():
        held = map_of(layer.adapter("default").chain()[0].delta)
        assert isinstance(held, Sparse)
        out[at] = Sparse(torch.ones_like(held.values), held.columns, held.starts, held.width).dense() > 0
    return out


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return Adam's first moments as matrices."""
    out = {}
    for at, layer in eckart.adapters(model).layers.items():
        delta = layer.adapter("default").chain()[0].delta
        held = map_of(delta)
        out[at] = Sparse(optimizer.state[delta.values]["exp_avg"], held.columns, held.starts, held.width).dense()
    return out


def test_lift_selects_anew_and_keeps_the_moments_of_what_stays():
    model = adapted("lift")
    disturb(model, 0.3)
    plain = copy.deepcopy(model)
    optimizer, other = optimizer_of(model, 0.0), optimizer_of(plain, 0.0)
    eckart.adapters(model).follow(optimizer, 4)
    run(model, optimizer, 3)
    run(plain, other, 3)
    before, after, first = places(plain), places(model), moments(plain, other)
    for at, layer in eckart.adapters(model).layers.items():
        dense = layer.held_map().dense().detach()
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        score = ((left[:, :2] * values[:2]) @ right[:2]).abs()
        least = score.flatten().topk(2 * sum(dense.shape)).values[-1]
        assert after[at].sum() == 2 * sum(dense.shape)
        assert (score[after[at]] >= least - 1e-4).all()
        assert (before[at] & ~after[at]).any()
        kept = first[at] * (before[at] & after[at])
        assert kept.any()
        torch.testing.assert_close(moments(model, optimizer)[at], kept)
    new = {at: after[at] & ~before[at] for at in after}
    run(model, optimizer, 1)  # the next step reaches what is new
    assert all(moments(model, optimizer)[at][new[at]].any() for at in new)
    assert all(torch.equal(where, after[at]) for at, where in places(model).items())


def test_lift_of_gradients_keeps_its_support():
    model = eckart.adapt(base(), "lift", budget=2, select="gradient", refresh=2, data=[IDS])
    start, optimizer = places(model), optimizer_of(model, 1e-2)
    eckart.adapters(model).follow(optimizer, 6)
    run(model, optimizer, 6)
    assert all(torch.equal(where, start[at]) for at, where in places(model).items())


@pytest.mark.parametrize("nuclear", [0.0, 1e-6])
def test_sara_trains_what_is_still_small_after_half(nuclear: float):
    model = adapted("sara", nuclear=nuclear)
    optimizer, handle = optimizer_of(model, 2e-3), eckart.adapters(model)
    handle.follow(optimizer, 8)
    run(model, optimizer, 4)
    half = {at: layer.held_map().dense().detach() for at, layer in handle.layers.items()}
    assert not any(optimizer.state.get(p) for p in model.parameters())
    grown = {at: (layer.base.weight.abs() < 5e-3) & (half[at].abs() >= 5e-3) for at, layer in handle.layers.items()}
    assert all(0 < where.sum() < (handle.layers[at].base.weight.abs() < 5e-3).sum() for at, where in grown.items())
    for _ in range(4):
        (model(IDS, labels=IDS).loss + handle.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for at, layer in handle.layers.items():
        now = layer.held_map().dense().detach()
        moved = (now - half[at]).abs() > 1e-7
        assert moved.any()
        assert (half[at].abs()[moved] < 5e-3).all()


@every
def test_the_short_runs_that_a_rate_is_chosen_by_move_too_and_leave_no_trace(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The rate that was swept for ends in the bytes of a run that was told it."""
    moved: list[int] = []
    behind = following.Behind
    monkeypatch.setattr(following, "Behind", lambda *args: moved.append(args[1]) or behind(*args))
    options = {"method": method, "settings": MOVING[method], "steps": 12, "batch": 2, "length": 16}
    found = eckart.tune(DEMO / "stories260k", DEMO / "train.txt", tmp_path / "auto", rate="auto", **options)
    assert {10, 12} == set(moved)
    assert moved.count(10) > moved.count(12)
    eckart.tune(DEMO / "stories260k", DEMO / "train.txt", tmp_path / "told", rate=found.rate, **options)
    for name in ("adapter.safetensors", "eckart_adapter.json", "report.json"):
        assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "told" / name).read_bytes()
