"""The rate at the edge of AdamW's stability, on quadratics whose curvature is known."""

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.methods.adapt import curvature
from eckart.methods.adapt.curvature import EDGE, EPSILON, edge_rate

SIZE = 12


class Bowl(nn.Module):
    """x^T H x / 2 plus a slope that every example has of its own."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)).Q
        self.hessian = turn @ torch.diag(values) @ turn.mT
        self.first = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(2, 4, generator=generator, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def loss(self, batch: Tensor) -> Tensor:
        x = torch.cat((self.first, self.second.flatten()))
        return x @ self.hessian @ x / 2 + (batch @ x).mean()


def share(name: str) -> float:
    return 4.0 if name == "second" else 1.0


def batches() -> list[Tensor]:
    return list(torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def wanted(bowl: Bowl) -> tuple[float, Tensor]:
    """Return the edge, and what Adam divides by, from the dense Hessian."""
    x = torch.cat((bowl.first, bowl.second.flatten())).detach()
    gradients = torch.stack([bowl.hessian @ x + batch.mean(0) for batch in batches()])
    shares = torch.tensor([share(n) for n in ["first"] * 4 + ["second"] * 8])
    divisor = (gradients.square().mean(0).sqrt() + EPSILON) / shares
    values = torch.linalg.eigvalsh(divisor.rsqrt()[:, None] * bowl.hessian * divisor.rsqrt())
    return EDGE / float(values[-1]), divisor


def test_it_is_that_of_the_dense_hessian_and_leaves_the_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(curvature, "PRODUCTS", SIZE)
    bowl = Bowl(torch.linspace(-3, 20, SIZE).double())
    before = [p.detach().clone() for p in bowl.parameters()]
    found = edge_rate(bowl, batches(), bowl.loss, rate=1e-3, share=share, seed=0)
    assert found == pytest.approx(wanted(bowl)[0], rel=1e-6)
    assert found == edge_rate(bowl, batches(), bowl.loss, rate=1e-3, share=share, seed=0)
    assert all(torch.equal(p, b) for p, b in zip(bowl.parameters(), before, strict=True))
    assert all(p.grad is None for p in bowl.parameters())


@pytest.mark.parametrize(("factor", "stable"), [(0.98, True), (1.02, False)])
def test_below_the_edge_adam_s_update_settles_and_beyond_it_does_not(factor: float, stable: bool):
    bowl = Bowl(torch.linspace(0.5, 20, SIZE).double())
    edge, divisor = wanted(bowl)
    x, momentum = torch.ones(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(3000):
        momentum = 0.9 * momentum + 0.1 * bowl.hessian @ x
        x = x - factor * edge * momentum / divisor
    assert (float(x.norm()) < 1e-3) is stable
    assert (float(x.norm()) > 1e3) is not stable


def test_what_has_no_edge_is_refused():
    bowl = Bowl(-torch.linspace(1, 20, SIZE).double())
    with pytest.raises(EckartError, match="curves upward in no direction"):
        edge_rate(bowl, batches(), bowl.loss, rate=1e-3, share=share, seed=0)
    with pytest.raises(EckartError, match="no gradient reaches"):
        edge_rate(bowl, batches(), lambda batch: 0 * bowl.first.sum(), rate=1e-3, share=share, seed=0)
