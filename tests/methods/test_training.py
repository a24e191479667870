"""The training loop: reproducible, resumable anywhere, stopped where it diverges."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.methods.training import Course, train
from eckart.progress import silent

DATA = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))


class Model(torch.nn.Module):
    """A frozen part, a trained one, and a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.trained = torch.nn.Linear(6, 6)
        self.register_buffer("steps", torch.zeros(()))

    def loss(self, step) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.dropout(self.frozen(step.samples), 0.5) + torch.rand(1, generator=step.generator)
        loss = (self.trained(hidden) - step.samples).square().mean()
        return loss + 0.01 * self.trained.weight.square().sum(), loss


class KilledError(Exception):
    pass


def run(path, *, seed=0, until=None, steps=20, course=None, model=None) -> Model:
    model = model or Model()

    def after(step) -> bool:
        model.steps += 1
        if step.index == until:
            raise KilledError
        return False

    course = course or Course(steps, 1e-2, 4, save_every=6)
    train(model, DATA, course, model.loss, state=path, seed=seed, after=after, progress=silent)
    return model


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_growing_penalty_does_not_silence_what_is_clipped_apart(tmp_path):
    """Without a penalty, or with one on what is apart, the others take the same steps."""

    def trained(penalty: float, **apart) -> Model:
        model = Model()
        model.register_parameter("gate", torch.nn.Parameter(torch.ones(3)))

        def loss(step):
            task = model.loss(step)[1]
            return task + penalty * 3**step.index * model.gate.sum(), task

        course, state = Course(8, 1e-2, 4), tmp_path / f"{penalty}{len(apart)}.safetensors"
        train(model, DATA, course, loss, state=state, seed=0, progress=silent, **apart)
        return model

    free = trained(0.0).trained.weight
    assert torch.equal(trained(10.0, apart=lambda name: name == "gate").trained.weight, free)
    assert not torch.allclose(trained(10.0).trained.weight, free, atol=1e-3)


def test_what_is_clipped_apart_is_clipped(tmp_path):
    """A penalty that grows and one that does not give the same steps where both are far above the clip."""

    def gate(penalty) -> torch.Tensor:
        model = Model()
        model.register_parameter("gate", torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])))

        def loss(step) -> tuple[torch.Tensor, torch.Tensor]:
            total, task = model.loss(step)
            return total + penalty(step.index) * model.gate.square().sum(), task

        course, state = Course(8, 1e-2, 4), tmp_path / f"{penalty(3)}.safetensors"
        train(model, DATA, course, loss, state=state, seed=0, progress=silent, apart=lambda name: name == "gate")
        return model.gate.detach()

    torch.testing.assert_close(gate(lambda index: 100.0 * 3**index), gate(lambda index: 100.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("until", [0, 4, 6, 11, 18])
def test_a_run_that_was_stopped_ends_in_the_same_bits(until, tmp_path):
    whole = run(tmp_path / "whole.safetensors")
    with pytest.raises(KilledError):
        run(tmp_path / "state.safetensors", until=until)
    torch.rand(until + 1)  # what others draw in between changes nothing
    again = run(tmp_path / "state.safetensors")
    assert same(whole, again)
    assert again.steps == 20
    held, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "state"))
    assert all(torch.equal(held[name], tensor) for name, tensor in other.items())
    assert held.keys() == other.keys()


def test_a_finished_run_is_not_done_again(tmp_path):
    whole = run(tmp_path / "state.safetensors")
    assert same(whole, run(tmp_path / "state.safetensors", until=0))


def test_seeds_matter_and_the_state_holds_only_what_changes(tmp_path):
    assert not same(run(tmp_path / "a.safetensors"), run(tmp_path / "b.safetensors", seed=1))
    names = {name.split("|")[1] for name in load_file(tmp_path / "a.safetensors") if name.startswith("model")}
    assert names == {"trained.weight", "trained.bias", "steps"}


def test_other_draws_are_not_disturbed(tmp_path):
    model = Model()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path / "state.safetensors", model=model)
    assert torch.equal(torch.rand(3), wanted)


def test_every_epoch_sees_every_window_once(tmp_path):
    seen, model = [], Model()

    def loss(step):
        seen.extend(step.samples[:, 0].tolist())
        return model.loss(step)

    train(model, DATA, Course(11, 1e-2, 4), loss, state=tmp_path / "s.safetensors", seed=0, progress=silent)
    epochs = [seen[i : i + 11] for i in range(0, 44, 11)]
    assert all(sorted(epoch) == sorted(DATA[:, 0].tolist()) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4])
def test_a_run_that_diverges_stops_with_the_last_good_state(bad, tmp_path):
    model, path = Model(), tmp_path / "state.safetensors"
    good = {}

    def loss(step):
        total, task = model.loss(step)
        if step.index == 6:
            good.update({k: v.clone() for k, v in model.state_dict().items()})
        return (total * bad, task * bad) if step.index == 9 else (total, task)

    message = r"the train run diverged at step 9: its loss went from .* to .*; the last good state is kept in .*state"
    with pytest.raises(EckartError, match=message):
        train(model, DATA, Course(20, 1e-2, 4, save_every=6), loss, state=path, seed=0, progress=silent)
    held = load_file(path)
    assert torch.equal(held["model|trained.weight"], good["trained.weight"])


def test_weights_that_the_last_step_broke_are_found(tmp_path):
    model, path = Model(), tmp_path / "state.safetensors"

    def after(step) -> bool:
        model.trained.weight.data[0, 0] = math.inf
        return True

    with pytest.raises(EckartError, match="diverged at step 1"):
        train(model, DATA, Course(9, 1e-2, 4), model.loss, state=path, seed=0, after=after, progress=silent)
    assert torch.isfinite(load_file(path)["model|trained.weight"]).all()


def test_a_run_may_end_itself(tmp_path):
    model, path = Model(), tmp_path / "state.safetensors"
    reported = []
    for _ in range(2):  # the second call finds it finished
        train(
            model, DATA, Course(20, 1e-2, 4), model.loss, state=path, seed=0, after=lambda step: step.index == 3,
            progress=lambda *step: reported.append(step),
        )  # fmt: skip
    assert [step for _, step, _ in reported] == [0, 1, 2, 3, 20, 20]


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    run(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EckartError, match=r"state\.safetensors is damaged .*; delete it and run again"):
        run(path)


def test_the_state_of_another_model_is_named(tmp_path):
    path, other = tmp_path / "state.safetensors", torch.nn.Linear(6, 6)
    run(path)
    with pytest.raises(EckartError, match="holds the state of another run or version; delete it and run again"):
        train(other, DATA, Course(1, 1.0, 1), lambda step: None, state=path, seed=0, progress=silent)


def test_rates_rise_then_fall():
    course = Course(100, 2.0, 1, final=0.25, warm_up=0.1)
    rates = [course.rate_at(i) for i in range(100)]
    assert rates[9] == max(rates) == 2.0
    assert rates[:9] == sorted(rates[:9])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.5, abs=0.01)
    assert {Course(50, 1.0, 1, final=1.0, warm_up=0.0).rate_at(i) for i in range(50)} == {1.0}


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch": 0}, {"save_every": 0}, {"rate": 0.0}])
def test_courses_that_cannot_be(bad):
    with pytest.raises(EckartError, match=f"{next(iter(bad))} must be"):
        Course(**{"steps": 1, "rate": 1.0, "batch": 1, **bad})
