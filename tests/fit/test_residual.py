"""Terms of mixed bits: the allocation against brute force, predictions against fits, sizes against what is made."""

import itertools

import pytest
import torch

from eckart.fit import Metric, error_of, regress
from eckart.fit.residual import HALF, TERM_BYTES, allocations, blank_full, blank_terms, fit_full, fit_terms, noise
from eckart.maps import Sum

SHARES = {2: 0.12, 3: 0.04, 4: 0.01, 8: 0.0001}


def decaying(m: int = 24, n: int = 16, power: float = 1.0, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values i^-power."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator, dtype=torch.float64))[0]
    return left * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power @ right.mT


def moment(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.mT @ x / (3 * size)


def test_no_choice_of_bits_by_component_is_better_than_those_offered():
    solved = regress(decaying(900, 6, 1.5))
    energies = (solved.errors()[:-1] - solved.errors()[1:]).tolist()

    def nbytes(bits: list[int]) -> float:
        return sum(bits) * 906 / 8 + TERM_BYTES * len(set(bits) - {0})

    offered = [(nbytes([b for b, k in t for _ in range(k)]), error) for t, error in allocations(solved, SHARES)]
    for price in (1e-7, 1e-6, 1e-5, 1e-4):
        best = min(
            sum(e * ({0: 1.0} | SHARES)[b] for e, b in zip(energies, bits, strict=True)) + price * nbytes(bits)
            for bits in itertools.product((0, *SHARES), repeat=len(energies))
        )
        found = min(error + price * size for size, error in offered)
        # a corner of the hull may lie between two of the prices tried
        assert best - 1e-12 <= found <= 1.05 * best


def test_terms_have_falling_bits_and_errors_fall_with_bytes():
    offered = allocations(regress(decaying()), SHARES)
    assert len(offered) > 10
    for terms, _ in offered:
        bits = [b for b, _ in terms]
        assert bits == sorted(set(bits), reverse=True)
        assert all(k > 0 for _, k in terms)
    errors = [error for _, error in offered]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("terms", [((8, 4),), ((2, 5),), ((8, 1), (4, 3), (2, 6)), ((16, 3),)])
def test_what_is_made_has_the_size_and_nearly_the_error_foretold(terms, weighted):
    target = decaying(40, 32, 0.7)
    metric = Metric(inputs=moment(32, 1), outputs=moment(40, 2)) if weighted else Metric()
    solved = regress(target, metric)
    map_, blank = fit_terms(target, metric, terms, 64, torch.bfloat16), blank_terms((40, 32), terms, 64, torch.bfloat16)
    assert map_.spec() == blank.spec()
    assert map_.nbytes == blank.nbytes
    assert isinstance(map_, Sum) == (len(terms) > 1)
    errors, at, expected = solved.errors(), 0, float(solved.errors()[sum(k for _, k in terms)])
    for bits, rank in terms:
        held = float(errors[at] - errors[at + rank])
        expected += held * noise(target, solved, bits, 64, torch.bfloat16)
        at += rank
    found = error_of(target, map_.to(torch.float64).dense(), metric)
    # later terms take up what earlier ones lost, so that less may remain than foretold
    assert 0.7 * expected < found < 1.15 * expected


def test_rounding_costs_less_with_more_bits():
    target = decaying(40, 32, 0.7)
    solved = regress(target)
    shares = [noise(target, solved, bits, 64, torch.bfloat16) for bits in (2, 3, 4, 8, HALF)]
    assert shares == sorted(shares, reverse=True)
    assert 0.05 < shares[0] < 0.4
    assert 0 < shares[3] < 1e-3
    assert shares[4] == 0


def test_a_matrix_of_zeros_has_nothing_to_store():
    solved = regress(torch.zeros(4, 3))
    assert allocations(solved, SHARES) == []
    assert noise(torch.zeros(4, 3), solved, 4, 64, torch.bfloat16) == 0


def test_all_of_a_matrix_as_codes():
    target = decaying(20, 30, 0.2)
    map_ = fit_full(target, Metric(), 3, 64, torch.bfloat16)
    assert map_.spec() == blank_full((20, 30), 3, 64, torch.bfloat16).spec()
    assert error_of(target, map_.to(torch.float64).dense(), Metric()) < 0.06 * float(target.square().sum())
