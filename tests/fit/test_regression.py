"""The closed form against brute force, textbook special cases and errors measured on the samples themselves.

Legend: x (N, n) inputs, s (N, n) shifted inputs, g (N, m) output gradients; T^T T = E[g g^T].
"""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit import Metric, Regression, metric, regress
from eckart.linalg import psd_roots
from eckart.maps import STORAGES, LowRank, Pivoted, pivoted_numbers

SHAPES = [(4, 7), (7, 4), (5, 5)]
PARTS = list(product([False, True], repeat=3))
SAMPLES = 60


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Samples:
    """A layer and what it sees; parts that are left out are None."""

    weight: Tensor
    x: Tensor
    s: Tensor
    g: Tensor | None
    shifted: bool
    bias: bool

    def metric(self) -> Metric:
        count = len(self.x)
        given = {"second": self.x.mT @ self.x / count}
        if self.g is not None:
            given["outputs"] = self.g.mT @ self.g / len(self.g)
        if self.shifted:
            given |= {"shifted": self.s.mT @ self.s / count, "cross": self.x.mT @ self.s / count}
        if self.bias:
            given["mean"] = self.x.mean(0)
            if self.shifted:
                given["shifted_mean"] = self.s.mean(0)
        return metric(**given)

    def loss(self, map_, offset: Tensor | None) -> float:
        """Return E |T (W x - W' s - c)|^2 as a mean over the samples."""
        residual = self.x @ self.weight.mT - map_(self.s) - (0.0 if offset is None else offset)
        return self.weighted(residual)

    def weighted(self, residual: Tensor) -> float:
        if self.g is None:
            return float(residual.square().sum(1).mean())
        return float((residual @ self.g.mT).square().sum() / (len(self.g) * len(residual)))


def samples(m: int, n: int, shifted: bool, outputs: bool, bias: bool, seed: int = 0) -> Samples:
    """Return correlated, uncentred inputs, a shift that is no multiple of them, and correlated gradients."""
    x = normal(SAMPLES, n, seed=seed) @ normal(n, n, seed=seed + 1) + normal(n, seed=seed + 2)
    s = 0.8 * x + 0.4 * normal(SAMPLES, n, seed=seed + 3) + 0.3 if shifted else x
    g = normal(SAMPLES, m, seed=seed + 4) @ normal(m, m, seed=seed + 5) if outputs else None
    return Samples(normal(m, n, seed=seed + 6), x, s, g, shifted, bias)


def brute_force(data: Samples, rank: int, rounds: int = 4000) -> float:
    """Return the loss found by alternating least squares on the samples, from the best of two random starts."""
    x, s = (t - t.mean(0) if data.bias else t for t in (data.x, data.s))
    target = x @ data.weight.mT  # (N, m)
    root = (
        torch.eye(target.shape[1], dtype=s.dtype) if data.g is None else torch.linalg.qr(data.g)[1] / len(data.g) ** 0.5
    )
    losses = []
    for seed in (11, 12):
        down = normal(rank, s.shape[1], seed=seed)
        for _ in range(rounds):
            up = torch.linalg.lstsq(s @ down.mT, target).solution.mT  # T drops out: every output on its own
            both = torch.linalg.lstsq(root @ up, root @ target.mT).solution  # (k, N)
            down = torch.linalg.lstsq(s, both.mT).solution.mT
        residual = target - s @ down.mT @ up.mT
        losses.append(data.weighted(residual))
    return min(losses)


@pytest.mark.parametrize(("shifted", "outputs", "bias"), PARTS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_equals_brute_force(m: int, n: int, shifted: bool, outputs: bool, bias: bool):
    data = samples(m, n, shifted, outputs, bias)
    solution = regress(data.weight, data.metric())
    assert solution.side == ("outputs" if m <= n else "inputs")
    for rank in (1, 3):
        found = solution.fit(rank, dtype=torch.float64)
        wanted = brute_force(data, rank, rounds=400)
        assert found.error == pytest.approx(wanted, rel=1e-6)
        assert data.loss(found.map, found.bias) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("shifted", "outputs", "bias"), PARTS)
@pytest.mark.parametrize(("m", "n"), [*SHAPES, (1, 5), (5, 1), (1, 1)])
def test_the_stated_error_of_every_rank_is_the_measured_one(m: int, n: int, shifted: bool, outputs: bool, bias: bool):
    data = samples(m, n, shifted, outputs, bias, seed=20)
    solution = regress(data.weight, data.metric())
    curve = solution.errors()
    assert curve.shape == (min(m, n) + 1,)
    assert (curve.diff() <= 0).all()
    zero = LowRank(torch.zeros(m, 0, dtype=torch.float64), torch.zeros(0, n, dtype=torch.float64))
    centre = data.weight @ data.x.mean(0) if bias else None
    assert solution.total == pytest.approx(data.loss(zero, centre), rel=1e-9)
    for rank in range(min(m, n) + 1):
        found = solution.fit(rank, dtype=torch.float64)
        assert found.error == pytest.approx(float(curve[rank]), rel=1e-9)
        assert found.relative == pytest.approx(found.error / solution.total, rel=1e-9)
        assert data.loss(found.map, found.bias) == pytest.approx(found.error, rel=1e-7, abs=1e-10 * solution.total)
        assert found.map.shape == (m, n)
        assert (found.bias is not None) == bias


def test_no_other_map_of_the_rank_is_better():
    data = samples(5, 6, True, True, True)
    found = regress(data.weight, data.metric()).fit(2, dtype=torch.float64)
    for seed in range(20):
        step = 1e-3 * normal(5, 2, seed=seed)
        other = LowRank(found.map.up + step, found.map.down + 1e-3 * normal(2, 6, seed=seed + 100))
        assert data.loss(other, found.bias) > found.error
    assert data.loss(found.map, found.bias + 1e-3) > found.error


# Textbook formulas, each in plain torch. W (m, n), x (N, n), k.


def by_svd(w: Tensor, k: int) -> Tensor:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :k] * s[:k]) @ v[:k]


def test_frobenius_is_the_svd():
    for m, n in SHAPES:
        w = normal(m, n, seed=1)
        for k in range(min(m, n) + 1):
            assert torch.allclose(regress(w).fit(k, dtype=torch.float64).map.dense(), by_svd(w, k), atol=1e-9)


def test_fwsvd():
    """Hsu et al. 2022: rows scaled by the root of their Fisher information."""
    for m, n in SHAPES:
        w, fisher = normal(m, n, seed=1), normal(m, seed=2).square()
        wanted = by_svd(w * fisher.sqrt()[:, None], 2) / fisher.sqrt()[:, None]
        assert torch.allclose(regress(w, Metric(outputs=fisher)).fit(2, dtype=torch.float64).map.dense(), wanted)


def test_asvd():
    """Yuan et al. 2023: columns scaled by the size of their activations."""
    for m, n in SHAPES:
        w, size = normal(m, n, seed=1), normal(n, seed=2).abs() ** 0.5
        wanted = by_svd(w * size, 2) / size
        found = regress(w, metric(size.square())).fit(2, dtype=torch.float64).map.dense()
        assert torch.allclose(found, wanted)


def test_svd_llm():
    """Wang et al. 2024: whitening by the Cholesky factor of the input Gram matrix."""
    for m, n in SHAPES:
        w, x = normal(m, n, seed=1), normal(40, n, seed=2) @ normal(n, n, seed=3)
        s = torch.linalg.cholesky(x.mT @ x)
        wanted = by_svd(w @ s, 2) @ torch.linalg.inv(s)
        found = regress(w, metric(x.mT @ x / 40)).fit(2, dtype=torch.float64).map.dense()
        assert torch.allclose(found, wanted, atol=1e-8)


def test_afm():
    """Principal components of the centred outputs, with the mean restored by the bias."""
    for m, n in SHAPES:
        w, x, b = normal(m, n, seed=1), normal(40, n, seed=2) + 1, normal(m, seed=4)
        y = x @ w.mT + b
        v = torch.linalg.svd(y - y.mean(0), full_matrices=False)[2][:2].mT  # (m, k)
        found = regress(w, metric(x.mT @ x / 40, mean=x.mean(0))).fit(2, dtype=torch.float64, bias=b)
        assert torch.allclose(found.map.dense(), v @ v.mT @ w, atol=1e-8)
        assert torch.allclose(found.bias, y.mean(0) - v @ v.mT @ w @ x.mean(0), atol=1e-8)


def test_kfac():
    """SVD of B^(1/2) W A^(1/2), the Kronecker-factored curvature."""
    for m, n in SHAPES:
        w, x, g = normal(m, n, seed=1), normal(40, n, seed=2), normal(40, m, seed=3)
        (a, a_inverse), (b, b_inverse) = psd_roots(x.mT @ x), psd_roots(g.mT @ g)
        wanted = b_inverse @ by_svd(b @ w @ a, 2) @ a_inverse
        found = regress(w, metric(x.mT @ x, outputs=g.mT @ g)).fit(2, dtype=torch.float64).map.dense()
        assert torch.allclose(found, wanted, atol=1e-8)


def test_aa_svd():
    """W C G^^-1 whitened on the shifted inputs, which full rank makes the least-squares layer."""
    for m, n in SHAPES:
        data = samples(m, n, True, False, False)
        wanted = torch.linalg.lstsq(data.s, data.x @ data.weight.mT).solution.mT
        found = regress(data.weight, data.metric()).fit(min(m, n), dtype=torch.float64).map.dense()
        assert torch.allclose(found, wanted, atol=1e-8)


def test_anchor_mixes_the_targets():
    """The target is W (a x + (1 - a) x^); 0 ignores the shift and 1 aims at the original output."""
    data = samples(4, 6, True, True, True)
    second, shifted, cross = (a.mT @ b / SAMPLES for a, b in ((data.x, data.x), (data.s, data.s), (data.x, data.s)))
    raw = {"second": second, "shifted": shifted, "cross": cross, "outputs": data.g.mT @ data.g / SAMPLES}
    raw |= {"mean": data.x.mean(0), "shifted_mean": data.s.mean(0)}
    for anchor in (0.0, 0.25, 1.0):
        mixed = Samples(data.weight, anchor * data.x + (1 - anchor) * data.s, data.s, data.g, True, True)
        found = regress(data.weight, metric(**raw, anchor=anchor)).fit(2, dtype=torch.float64)
        assert mixed.loss(found.map, found.bias) == pytest.approx(found.error, rel=1e-8)
        assert found.error == pytest.approx(brute_force(mixed, 2, rounds=300), rel=1e-6)


@pytest.mark.parametrize("shifted", [False, True])
def test_shrinkage_is_isotropic_noise_both_streams_share(shifted: bool):
    data, amount = samples(4, 6, shifted, False, False), 0.3
    second, both, hat = (a.mT @ b / SAMPLES for a, b in ((data.x, data.x), (data.x, data.s), (data.s, data.s)))
    extra = {"shifted": hat, "cross": both} if shifted else {}
    found = regress(data.weight, metric(second, **extra, input_shrinkage=amount)).fit(2, dtype=torch.float64)
    level = float((hat if shifted else second).diagonal().mean()) ** 0.5
    noise = torch.eye(6, dtype=torch.float64) * (amount * level**2 * SAMPLES / (1 - amount)) ** 0.5
    noisy = Samples(data.weight, torch.cat((data.x, noise)), torch.cat((data.s, noise)), None, shifted, False)
    measured = noisy.loss(found.map, None) * (SAMPLES + 6) / SAMPLES * (1 - amount)
    assert measured == pytest.approx(found.error, rel=1e-8)


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_stored_forms_are_the_same_matrix(name: str, m: int, n: int):
    data = samples(m, n, True, True, True)
    solution = regress(data.weight, data.metric())
    for k in range(min(m, n) + 1):
        wanted = solution.fit(k, dtype=torch.float64).map.dense()
        found = solution.fit(k, stored=name, dtype=torch.float32)
        assert found.map.dtype == found.bias.dtype == torch.float32
        assert torch.linalg.norm(found.map.dense().double() - wanted) <= 1e-6 * torch.linalg.norm(wanted)
        if isinstance(found.map, Pivoted):
            assert found.map.numbers == pivoted_numbers((m, n), k) == k * (m + n - k)


def test_the_bias_is_fitted_to_the_rounded_map():
    data = samples(6, 6, False, False, True)
    data.x = data.s = data.x + 100
    found = regress(data.weight, data.metric()).fit(6, dtype=torch.bfloat16)
    lost = (data.x @ data.weight.mT - found.map.to(torch.float64)(data.x)).mean(0)  # by rounding the numbers alone
    assert float(lost.abs().max()) > 0.1
    assert torch.allclose(found.bias.double(), lost, rtol=torch.finfo(torch.bfloat16).eps)


def test_a_layer_keeps_its_bias():
    w, b = normal(3, 4, seed=0), normal(3, seed=1)
    assert torch.allclose(regress(w).fit(2, bias=b, dtype=torch.float64).bias, b)
    assert regress(w).fit(2).bias is None


def test_factors_are_balanced():
    factors = regress(normal(5, 7, seed=0) * 1e6).factors(3)
    assert torch.allclose(factors.up.norm(dim=0), factors.down.norm(dim=1))


dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 8), st.integers(0, 10**6), dtypes, st.booleans())
def test_any_rank_and_dtype(m: int, n: int, rank: int, seed: int, dtype: torch.dtype, weighted: bool):
    """Deficient, zero, one-row and one-column weights and singular metrics give finite maps of the stated error."""
    rank = min(rank, m, n)
    weight = (normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1)).to(dtype)
    x = normal(3, n, seed=seed + 2)
    g = normal(2, m, seed=seed + 3)
    given = metric(x.mT @ x / 3, outputs=g.mT @ g / 2) if weighted else Metric()
    solution = regress(weight, given)
    w = weight.double()
    zero = float((g @ w @ x.mT).square().sum() / 6) if weighted else float(w.square().sum())
    assert solution.total == pytest.approx(zero, rel=1e-9, abs=1e-12)
    for k in range(min(m, n) + 1):
        found = solution.fit(k, dtype=torch.float64)
        change = w - found.map.dense()
        error = float((g @ change @ x.mT).square().sum() / 6) if weighted else float(change.square().sum())
        assert torch.isfinite(found.map.dense()).all()
        assert error == pytest.approx(found.error, rel=1e-6, abs=1e-9 * zero)
        assert 0 <= found.relative <= 1 + 1e-9
    assert solution.fit(min(m, n), dtype=dtype).map.dtype == dtype


def test_a_deficient_weight_gives_no_more_than_its_rank():
    solution = regress(normal(6, 2, seed=0) @ normal(2, 5, seed=1))
    assert solution.rank == 2
    assert solution.fit(4).map.rank == 2
    assert solution.fit(4).error == pytest.approx(0.0, abs=1e-10 * solution.total)


def test_output_shrinkage():
    w, g = normal(3, 4, seed=0), normal(9, 3, seed=1)
    moment = g.mT @ g
    mixed = 0.75 * moment + 0.25 * float(moment.diagonal().mean()) * torch.eye(3, dtype=torch.float64)
    found, wanted = regress(w, metric(outputs=moment, output_shrinkage=0.25)), regress(w, Metric(outputs=mixed))
    assert torch.allclose(found.errors(), wanted.errors())
    assert not torch.allclose(found.errors(), regress(w, Metric(outputs=moment)).errors())


def test_a_zero_weight_gives_the_zero_map():
    for stored in STORAGES:
        found = regress(torch.zeros(3, 4)).fit(2, stored=stored)
        assert found.map.dense().equal(torch.zeros(3, 4))
        assert (found.error, found.relative, found.map.numbers) == (0.0, 0.0, 0)


def test_a_zero_metric_keeps_the_weight():
    """Without data no direction counts more than another, and nothing may be lost at full rank."""
    w = normal(3, 4, seed=0)
    for empty in (metric(torch.zeros(4, 4)), metric(outputs=torch.zeros(3, 3)), metric(outputs=torch.zeros(3))):
        found = regress(w, empty).fit(3, dtype=torch.float64)
        assert torch.isfinite(found.map.dense()).all()
    shifted = metric(torch.zeros(4, 4), shifted=torch.zeros(4, 4), cross=torch.zeros(4, 4))
    assert torch.isfinite(regress(w, shifted).fit(3).map.dense()).all()


def test_directions_without_data_keep_the_weight():
    """At full rank a shifted fit changes only what the shifted inputs reach."""
    data = samples(3, 6, True, False, False)
    seen = torch.cat((data.s[:, :4], torch.zeros(SAMPLES, 2, dtype=torch.float64)), 1)
    x = torch.cat((data.x[:, :4], torch.zeros(SAMPLES, 2, dtype=torch.float64)), 1)
    given = metric(x.mT @ x, shifted=seen.mT @ seen, cross=x.mT @ seen)
    found = regress(data.weight, given).fit(3, dtype=torch.float64).map.dense()
    assert torch.allclose(found[:, 4:], data.weight[:, 4:], atol=1e-6)
    assert not torch.allclose(found[:, :4], data.weight[:, :4], atol=1e-3)


@pytest.mark.parametrize(("m", "n"), [(1200, 1500), (1500, 1200)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-2), (torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
def test_the_randomized_path_keeps_its_promise(m: int, n: int, weighted: bool, dtype: torch.dtype, accuracy: float):
    """The root of the error, measured on the returned factors, exceeds the optimum by at most the share asked for."""
    rank, generator = 60, torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator) * (torch.arange(1, n + 1) ** -0.5)
    weight = (torch.randn(m, m, generator=generator) * torch.arange(1, m + 1) ** -0.4 @ weight).to(dtype)
    given = Metric()
    if weighted:
        x = torch.randn(2000, n, generator=generator) * torch.arange(1, n + 1) ** -0.3
        given = metric(x.mT @ x / 2000, outputs=torch.arange(1, m + 1) ** -0.5, input_shrinkage=0.01)
    solution = regress(weight, given, rank=rank, accuracy=accuracy)
    assert solution.eigen.method.startswith("krylov")
    change = weight.double() - solution.factors(rank).to(torch.float64).dense()
    optimum = _optimum(weight.double(), given, rank)
    measured = _energy(change, given)
    assert optimum > 0
    assert measured**0.5 <= (1 + accuracy) * optimum**0.5
    assert float(solution.errors()[-1]) == pytest.approx(measured, rel=0.05)


def _energy(change: Tensor, given: Metric) -> float:
    right = change if given.inputs is None else change @ given.inputs
    left = change if given.outputs is None else change * given.outputs[:, None]
    return float((left * right).sum())


def _optimum(weight: Tensor, given: Metric, rank: int) -> float:
    """Return the error of the best map of a rank, by a full decomposition that shares no code with the solver."""
    rows = weight if given.outputs is None else weight * given.outputs.sqrt()[:, None]
    whole = rows if given.inputs is None else rows @ torch.linalg.cholesky(given.inputs)
    gram = whole @ whole.mT if whole.shape[0] < whole.shape[1] else whole.mT @ whole
    return float(torch.linalg.eigvalsh(gram)[:-rank].sum())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"non-empty matrix, got a tensor of shape \(3,\)"),
        (torch.ones(0, 3), r"non-empty matrix, got a tensor of shape \(0, 3\)"),
        (torch.ones(2, 2, 2), "non-empty matrix"),
        (torch.ones(2, 2, dtype=torch.int64), r"dtype torch.int64 must be floating"),
        (torch.tensor([[1.0, float("nan")]]), "without NaN or Inf"),
        (torch.tensor([[1.0, float("inf")]]), "without NaN or Inf"),
    ],
)
def test_a_weight_is_refused_in_one_sentence(weight: Tensor, message: str):
    with pytest.raises(EckartError, match=message) as caught:
        regress(weight)
    assert "\n" not in str(caught.value)


I3, I4 = torch.eye(3), torch.eye(4)
NAN = torch.full((4, 4), float("nan"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"second": I3}, r"inputs has shape \(3, 3\), but the layer needs \(4, 4\)"),
        ({"second": torch.ones(3)}, r"inputs has shape \(3,\)"),
        ({"second": torch.ones(4, 3)}, r"second has shape \(4, 3\)"),
        ({"second": torch.tensor(1.0)}, r"second has shape \(\)"),
        ({"second": torch.ones(4), "shifted": I4, "cross": I4}, r"second has shape \(4,\).*must be \(4, 4\)"),
        ({"outputs": I4}, r"outputs has shape \(4, 4\), but the layer needs \(3, 3\)"),
        ({"second": I4, "mean": torch.ones(3)}, r"shape"),
        ({"second": I4, "shifted": I4}, "both their second moment and the cross moment"),
        ({"second": I4, "cross": I4}, "both their second moment and the cross moment"),
        ({"second": I4, "shifted": I3, "cross": I3}, "shape"),
        ({"second": I4, "shifted": I4, "cross": I4, "mean": torch.ones(4)}, "needs both means"),
        ({"second": NAN}, "inputs holds NaN or Inf"),
        ({"outputs": torch.tensor([1.0, 2.0, float("inf")])}, "outputs holds NaN or Inf"),
        ({"second": I4, "input_shrinkage": 2.0}, r"shrinkage must lie in \[0, 1\], got 2.0"),
        ({"second": I4, "shifted": I4, "cross": I4, "input_shrinkage": -1.0}, "shrinkage must lie in"),
    ],
)
def test_a_metric_is_refused_in_one_sentence(parts: dict, message: str):
    with pytest.raises(EckartError, match=message) as caught:
        regress(torch.ones(3, 4), metric(**parts))
    assert "\n" not in str(caught.value)


def test_ranks_beyond_those_computed_are_refused():
    solution: Regression = regress(normal(6, 8, seed=0), rank=2)
    assert solution.errors().shape == (3,)
    assert solution.fit(2).map.shape == (6, 8)
    for ask in (lambda: solution.fit(3), lambda: solution.factors(5), lambda: solution.factors(-1)):
        with pytest.raises(EckartError, match="rank"):
            ask()
