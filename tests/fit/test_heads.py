"""Fewer channels per head: values are the best product of their rank, channels those of the largest scores."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.fit.heads import choose_channels, fit_values, output_moments


def normal(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_moments_of_heads_are_those_of_their_outputs(seed):
    draw = normal(seed)
    x, weight, bias = draw(50, 5) + 1, draw(6, 5), draw(6)
    y = (x @ weight.mT + bias).view(50, 3, 2)
    expected = torch.einsum("thi,thj->hij", y, y) / 50
    found = output_moments(weight, bias, x.mean(0), x.mT @ x / 50, heads=3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_values_are_the_best_product_of_their_rank(seed, keys, shared, count):
    """Against the truncated SVD of every stacked product  O_j V C^1/2."""
    draw = normal(seed)
    size, n, d = 4, 6, 7
    x = draw(40, n) @ draw(n, n)
    second = x.mT @ x / 40
    v, out = draw(keys * size, n), draw(d, keys * shared * size)
    zero = torch.zeros(keys * size, dtype=torch.float64)
    fit = fit_values(v, zero, out, output_moments(v, zero, x.mean(0), second, keys), count)
    values, vectors = torch.linalg.eigh(second)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    error = total = 0.0
    for g in range(keys):
        heads = range(g * shared, (g + 1) * shared)
        stack = torch.cat([out[:, j * size : (j + 1) * size] for j in heads])
        product = stack @ v[g * size : (g + 1) * size]
        spectrum = torch.linalg.svdvals(product @ root).square()
        error, total = error + float(spectrum[count:].sum()), total + float(spectrum.sum())
        narrow = torch.cat([fit.out[:, j * count : (j + 1) * count] for j in heads])
        off = product - narrow @ fit.weight[g * count : (g + 1) * count]
        assert float((off @ root).square().sum()) == pytest.approx(float(spectrum[count:].sum()), abs=1e-8 * total)
    assert fit.error == pytest.approx(error, rel=1e-6, abs=1e-8 * total)
    assert fit.relative == pytest.approx(fit.error / total)


def test_the_bias_of_values_is_projected_with_them():
    draw = normal(1)
    x, v, bias, out = draw(60, 5), draw(4, 5), 3 * draw(4), draw(8, 4)
    fit = fit_values(v, bias, out, output_moments(v, bias, x.mean(0), x.mT @ x / 60, 1), 2)
    off = (x @ v.mT + bias) @ out.mT - (x @ fit.weight.mT + fit.bias) @ fit.out.mT
    assert float(off.square().sum(1).mean()) == pytest.approx(fit.error, rel=1e-8)
    best = torch.linalg.svdvals((x @ v.mT + bias) @ out.mT).square()[2:].sum() / 60
    assert fit.error == pytest.approx(float(best), rel=1e-8)


@given(st.integers(0, 10_000), st.booleans(), st.integers(1, 2), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_channels_kept_have_the_largest_scores(seed, paired, shared, count):
    draw, keys, size = normal(seed), 2, 6
    q, k = draw(30, keys * shared, size), draw(30, keys, size)
    units = torch.arange(size).view(2, -1).mT if paired else torch.arange(size)[:, None]
    count *= units.shape[1]
    moments = [torch.einsum("thi,thj->hij", part, part) / 30 for part in (q, k)]
    kept = choose_channels(*moments, units, count)
    assert kept.shape == (keys, count)

    def score(head: int, chosen: tuple[int, ...]) -> float:
        """The sum over chosen units of the product of root mean squares, written out."""
        out = 0.0
        for unit in chosen:
            channels = units[unit].tolist()
            of_key = sum(float(k[:, head, c].square().mean()) for c in channels)
            for j in range(head * shared, (head + 1) * shared):
                of_query = sum(float(q[:, j, c].square().mean()) for c in channels)
                out += (of_query * of_key) ** 0.5
        return out

    for head in range(keys):
        every = list(itertools.combinations(range(len(units)), count // units.shape[1]))
        best = max(every, key=lambda chosen: score(head, chosen))
        assert kept[head].tolist() == sorted(c for unit in best for c in units[unit].tolist())
