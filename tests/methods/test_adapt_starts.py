"""What every method starts from, against the paper's formula in a few lines of plain torch.

That an adapted layer starts as its base says nothing of that: a start that is subtracted and added again cancels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eckart
from eckart.errors import EckartError
from eckart.fit import Metric
from eckart.fit.kronecker import fit_kronecker
from eckart.hosts import Adapter, map_of
from eckart.maps import LowRank
from eckart.stats import Statistics

M, N, R = 24, 32, 4


def weight() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(M, N) @ torch.diag(torch.linspace(2, 0.1, N))


class Model(nn.Module):
    """One layer behind an embedding, with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(50, N), nn.Linear(N, M, bias=False)
        torch.manual_seed(1)
        nn.init.normal_(self.embedding.weight)
        with torch.no_grad():
            self.embedding.weight *= torch.linspace(3, 0.2, N)
            self.layer.weight.copy_(weight())

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        self.loss = self.layer(self.embedding(input_ids)).square().mean()
        return self


IDS = torch.arange(50).reshape(5, 10)


def adapter(method: str, **settings: Any) -> Adapter:
    model = eckart.adapt(Model(), method, targets=["layer"], data=[IDS], **settings)
    return eckart.adapters(model).layers["layer"].adapter("default")


def started(method: str, **settings: Any) -> Tensor:
    """The map that trains, s D, of a method whose start is subtracted; the frozen one is the same, with a minus."""
    frozen, trained = adapter(method, **settings).chain()
    assert not any(p.requires_grad for p in frozen.parameters())
    start = trained.scale * map_of(trained.delta).dense()
    assert torch.allclose(frozen.scale * map_of(frozen.delta).dense(), -start)
    return start.detach()


def best(matrix: Tensor, rank: int = R) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("method", ["pissa", "sorsa"])
@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_the_principal_part_of_the_weight(method: str, alpha: float):
    assert torch.allclose(started(method, rank=R, alpha=alpha), best(weight()), atol=1e-4)


def test_pissa_shares_the_values_out_evenly():
    trained = adapter("pissa", rank=R).chain()[1]
    up, down = trained.delta.up.weight, trained.delta.down.weight
    values = torch.linalg.svdvals(weight())[:R] / trained.scale
    assert torch.allclose((up.mT @ up).diagonal(), values, rtol=1e-4)
    assert torch.allclose((down @ down.mT).diagonal(), values, rtol=1e-4)


def test_olora_is_the_first_columns_of_qr():
    q, r = torch.linalg.qr(weight())
    scale = 16.0 / R
    assert torch.allclose(started("olora", rank=R), scale * q[:, :R] @ r[:R], atol=1e-4)


def inputs() -> Tensor:
    return Model().embedding(IDS).detach().flatten(0, 1).double()


def test_corda_is_the_decomposition_under_the_inputs_moment():
    x = inputs()
    c = x.mT @ x / len(x)
    c = c + 0.01 * c.diagonal().mean() * torch.eye(N)
    u, s, v = torch.linalg.svd(weight().double() @ c, full_matrices=False)
    back = v @ torch.linalg.inv(c)
    for mode, part in (("instruction", slice(0, R)), ("knowledge", slice(M - R, M))):
        expected = (u[:, part] * s[part]) @ back[part]
        assert torch.allclose(started("corda", rank=R, mode=mode).double(), expected, atol=1e-4)


def test_eva_s_first_factor_spans_what_the_inputs_vary_in():
    down = map_of(adapter("eva", rank=R, rho=1.0).chain()[0].delta)
    assert isinstance(down, LowRank)
    centered = inputs() - inputs().mean(0)
    principal = torch.linalg.svd(centered, full_matrices=False).Vh[:R]
    cosines = torch.linalg.svdvals(down.down.detach().double() @ principal.mT)
    assert torch.allclose(cosines, torch.ones(R, dtype=torch.float64), atol=1e-4)
    assert torch.allclose((down.down @ down.down.mT).detach(), torch.eye(R), atol=1e-4)


def test_the_frozen_factors_of_lora_xs_and_svfit_are_singular_vectors():
    u, s, v = torch.linalg.svd(weight(), full_matrices=False)
    outer, core, inner = (map_of(m).dense() for m in adapter("lora-xs", rank=R).chain()[0].delta.children())
    assert torch.allclose(outer @ inner, (u[:, :R] * s[:R]) @ v[:R], atol=1e-4)
    assert 0 < core.abs().max() < 1e-4
    outer, core, inner = (map_of(m).dense() for m in adapter("svfit", rank=R).chain()[0].delta.children())
    assert torch.allclose(outer @ inner, u[:, :R] @ v[:R], atol=1e-4)
    assert not core.any()


def test_lora_sb_starts_at_the_first_step_of_full_fine_tuning():
    model = Model()
    model(IDS).loss.backward()
    expected = best(-1e-3 * model.layer.weight.grad.sign())
    assert torch.allclose(map_of(adapter("lora-sb", rank=R, step=1e-3).chain()[0].delta).dense(), expected, atol=1e-6)


def test_soka_is_the_best_sum_of_kronecker_products():
    expected = fit_kronecker(weight(), Metric(), (8, 8), 2).dense()
    assert torch.allclose(started("soka", rank=2, block=8).double(), expected, atol=1e-4)


@pytest.mark.parametrize(("method", "scale"), [("lora", 10 / R), ("rslora", 10 / R**0.5), ("lora-pro", 10 / R)])
def test_scales(method: str, scale: float):
    assert adapter(method, rank=R, alpha=10.0).chain()[0].scale == pytest.approx(scale)


def test_dora_s_lengths_are_those_of_the_rows():
    assert torch.allclose(adapter("dora", rank=R).chain()[1].magnitude, weight().norm(dim=1))


def test_allora_speeds_up_short_rows():
    model = eckart.adapt(Model(), "allora", targets=["layer"], rank=R, eta=8.0)
    delta = eckart.adapters(model).layers["layer"].adapter("default").chain()[0].delta
    with torch.no_grad():
        delta.up.weight[0] = 3.0
    gradients = []
    for rule in (True, False):
        if not rule:
            eckart.adapters(model).layers["layer"].adapter("default").rule(None)
        model.zero_grad()
        model(IDS).loss.backward()
        gradients.append((delta.up.weight.grad.clone(), delta.down.weight.grad.clone()))
    (ruled_up, ruled_down), (up, down) = gradients
    factor = 1 / (delta.up.weight.norm(dim=1, keepdim=True) + 1 / 64).sqrt()
    assert factor[1] == 8.0
    assert torch.allclose(ruled_up, factor * up)
    assert torch.equal(ruled_down, down)


@pytest.mark.parametrize("method", ["corda", "eva", "lora-sb"])
def test_one_pass_serves_several_starts(method: str):
    model = Model()
    found = eckart.start_statistics(model, [IDS], targets=["layer"])
    eckart.adapt(model, "pissa", name="other", targets=["layer"], rank=R)
    eckart.adapt(model, method, targets=["layer"], data=found, rank=R)
    shared = eckart.adapters(model).layers["layer"].adapter("default").state_dict()
    own = adapter(method, rank=R).state_dict()
    assert shared.keys() == own.keys()
    assert all(torch.equal(shared[key], own[key]) for key in own)
    eckart.adapters(model).remove()
    forward = eckart.start_statistics(model, [IDS], targets=["layer"], gradients=False)
    assert not forward.gradients
    if method != "lora-sb":
        eckart.adapt(model, method, targets=["layer"], data=forward, rank=R)
        alone = eckart.adapters(model).layers["layer"].adapter("default").state_dict()
        assert all(torch.equal(alone[key], own[key]) for key in own)
        eckart.adapters(model).remove()
    with pytest.raises(EckartError, match=r"what layer sees|gradients at layer"):
        eckart.adapt(model, method, targets=["layer"], data=Statistics({}, {}), rank=R)
