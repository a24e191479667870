"""Matching pursuit against a loop that solves least squares at every step, and against scikit-learn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp_gram

from eckart.errors import EckartError
from eckart.linalg import orthogonal_matching_pursuit


def problem(signals: int, atoms: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(atoms, width, generator=generator, dtype=torch.float64)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    return dictionary, torch.randn(signals, width, generator=generator, dtype=torch.float64)


def brute_force(dictionary: torch.Tensor, signal: torch.Tensor, nonzeros: int) -> torch.Tensor:
    """Return the code of one signal, (k,), choosing and projecting as the definition says."""
    chosen, code = [], torch.zeros(dictionary.shape[0], dtype=signal.dtype)
    residual = signal
    for _ in range(nonzeros):
        scores = (dictionary @ residual).abs()
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        values = torch.linalg.lstsq(dictionary[chosen].mT, signal).solution
        residual = signal - dictionary[chosen].mT @ values
    code[chosen] = values
    return code


def coded(dictionary, signals, nonzeros):
    atoms, values = orthogonal_matching_pursuit(dictionary @ dictionary.mT, signals @ dictionary.mT, nonzeros)
    return torch.zeros(len(signals), len(dictionary), dtype=values.dtype).scatter(1, atoms, values)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(6, 15), st.integers(0, 2**31), st.data())
def test_equals_the_definition(signals, atoms, width, seed, data):
    nonzeros = data.draw(st.integers(1, min(atoms, width - 1)))
    dictionary, x = problem(signals, atoms, width, seed)
    found = coded(dictionary, x, nonzeros)
    expected = torch.stack([brute_force(dictionary, one, nonzeros) for one in x])
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


def test_equals_scikit_learn():
    dictionary, x = problem(40, 64, 32, 0)
    gram, correlations = dictionary @ dictionary.mT, x @ dictionary.mT
    expected = orthogonal_mp_gram(gram.numpy(), correlations.mT.numpy(), n_nonzero_coefs=8).T
    torch.testing.assert_close(coded(dictionary, x, 8), torch.from_numpy(expected.copy()), atol=1e-9, rtol=1e-9)


def test_chunks_change_nothing(monkeypatch):
    dictionary, x = problem(23, 16, 12, 1)
    whole = coded(dictionary, x, 4)
    monkeypatch.setattr("eckart.linalg.matching_pursuit.CHUNK_NUMBERS", 5 * 16)
    torch.testing.assert_close(coded(dictionary, x, 4), whole, atol=1e-12, rtol=1e-12)


def test_signals_of_few_atoms_are_found_exactly():
    dictionary, _ = problem(1, 20, 30, 2)
    codes = torch.zeros(10, 20, dtype=torch.float64)
    codes[torch.arange(10), torch.arange(10)] = 2.0
    torch.testing.assert_close(coded(dictionary, codes @ dictionary, 5), codes, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_signals_equal_atoms_and_zero_atoms(dtype):
    dictionary, x = problem(4, 6, 5, 3)
    dictionary[1], dictionary[2] = dictionary[0], 0.0
    x[0] = 0.0
    found = coded(dictionary.to(dtype), x.to(dtype), 6)
    assert torch.isfinite(found).all()
    assert not found[0].any()
    best = torch.linalg.lstsq(dictionary.mT, x.mT, driver="gelsd").solution.mT @ dictionary
    torch.testing.assert_close(found.double() @ dictionary, best, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("gram", "correlations", "nonzeros", "message"),
    [
        (torch.eye(3), torch.ones(2, 4), 1, "needs a Gram matrix"),
        (torch.ones(3, 2), torch.ones(2, 3), 1, "needs a Gram matrix"),
        (torch.eye(3), torch.ones(2, 3), 4, "4 non-zeros were asked for with 3 atoms"),
        (torch.eye(3), torch.ones(2, 3), 0, "0 non-zeros"),
    ],
)
def test_bad_input(gram, correlations, nonzeros, message):
    with pytest.raises(EckartError, match=message):
        orthogonal_matching_pursuit(gram, correlations, nonzeros)
