"""Dictionaries against least squares, against the regression they contain, and against codes that were planted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eckart.errors import EckartError
from eckart.fit import Metric, best_bias, error_of, regress
from eckart.fit import metric as build_metric
from eckart.fit.dictionary import (
    best_atoms,
    closed_form_learner,
    dictionary_fitter,
    keep_largest,
    matching_pursuit_learner,
    orthogonal_learner,
)
from eckart.fit.families import dictionary_family
from eckart.maps import Bitmap, Dense, Product

LEARNERS = {"cospadi": matching_pursuit_learner(6), "compot": orthogonal_learner(6), "rocket": closed_form_learner(0.5)}
seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(n: int, m: int, seed: int) -> dict[str, torch.Tensor]:
    """Moments of inputs x, shifted inputs x^ and output gradients, from samples, with the samples."""
    x = normal(60, n, seed=seed) @ normal(n, n, seed=seed + 1) + 0.5
    shifted, g = x + 0.3 * normal(60, n, seed=seed + 2), normal(60, m, seed=seed + 3) @ normal(m, m, seed=seed + 4)
    return {"x": x, "shifted": shifted, "g": g}


@given(st.integers(1, 6), st.integers(1, 7), seeds, st.booleans(), st.booleans(), st.booleans())
def test_the_error_is_that_of_the_samples(m, n, seed, with_outputs, with_shift, centred):
    data = moments(n, m, seed)
    x, seen = data["x"], data["shifted"] if with_shift else data["x"]
    outputs = data["g"].mT @ data["g"] / 60 if with_outputs else None
    metric = build_metric(
        x.mT @ x / 60,
        mean=x.mean(0) if centred else None,
        shifted=seen.mT @ seen / 60 if with_shift else None,
        cross=x.mT @ seen / 60 if with_shift else None,
        shifted_mean=seen.mean(0) if centred and with_shift else None,
        outputs=outputs,
    )
    weight, other = normal(m, n, seed=seed + 5), normal(m, n, seed=seed + 6)
    bias = best_bias(weight, Dense(other), metric)
    assert (bias is None) != centred
    change = x @ weight.mT - seen @ other.mT - (0 if bias is None else bias)
    weighted = change if outputs is None else change @ outputs
    expected = float((weighted * change).sum() / 60)
    assert error_of(weight, other, metric) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 4), seeds, st.booleans())
def test_atoms_are_the_weighted_least_squares_solution(m, n, k, seed, diagonal):
    k = min(k, m)
    codes, target, root = normal(m, k, seed=seed), normal(m, n, seed=seed + 1), normal(m, m, seed=seed + 2)
    root = root.diagonal().abs() + 0.1 if diagonal else root
    full = torch.diag(root) if diagonal else root
    expected = torch.linalg.lstsq(full @ codes, full @ target, driver="gelsd").solution
    outputs = root.square() if diagonal else root.mT @ root
    found = best_atoms(codes, target, outputs)
    ours, best = (float((full @ (target - codes @ atoms)).square().sum()) for atoms in (found, expected))
    assert ours == pytest.approx(best, rel=1e-5, abs=1e-7 * float((full @ target).square().sum()))


@pytest.mark.parametrize("name", list(LEARNERS))
def test_with_full_rows_it_is_the_truncated_svd(name):
    weight, x = normal(12, 9, seed=0), normal(50, 9, seed=1) @ normal(9, 9, seed=2)
    metric = Metric(inputs=x.mT @ x / 50)
    for k in (1, 4, 9):
        found = error_of(weight, dictionary_fitter(weight, metric, LEARNERS[name])(k, k).dense(), metric)
        scale = error_of(weight, torch.zeros_like(weight), metric)
        assert found == pytest.approx(float(regress(weight, metric).errors()[k]), rel=1e-6, abs=1e-8 * scale)


@pytest.mark.parametrize("name", list(LEARNERS))
@pytest.mark.parametrize("with_metric", [False, True])
def test_more_is_never_worse_and_counts_as_stated(name, with_metric):
    weight, x = normal(40, 16, seed=3), normal(80, 16, seed=4) @ normal(16, 16, seed=5)
    metric = Metric(inputs=x.mT @ x / 80 if with_metric else None)
    family, errors = dictionary_family(LEARNERS[name]), []
    sizes = [2, 6, 12, 16, 20, family.largest((40, 16))]
    for size in sizes:
        map_ = family.fit(weight, metric, size)
        assert isinstance(map_, Product)
        assert [type(part) for part in map_.maps] == [Bitmap, Dense]
        assert map_.numbers == family.numbers((40, 16), size)
        stored = map_.nbytes - 8 * map_.numbers
        assert stored == family.index_bytes((40, 16), size)
        errors.append(error_of(weight, map_.dense(), metric))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-9 * errors[0])


def test_planted_codes_are_found():
    codes = keep_largest(normal(300, 12, seed=6), 2)
    dictionary = normal(12, 20, seed=7)
    weight = codes @ (dictionary / dictionary.norm(dim=1, keepdim=True))
    low, sparse = (
        error_of(weight, map_.dense(), Metric())
        for map_ in (
            regress(weight).fit(6).map,
            dictionary_fitter(weight, Metric(), matching_pursuit_learner(40))(12, 2),
        )
    )
    assert sparse < 0.5 * low  # with 840 numbers against 1,920


def test_iterations_help():
    weight = keep_largest(normal(200, 12, seed=8), 2) @ normal(12, 20, seed=9)
    for learner in (matching_pursuit_learner, orthogonal_learner):
        none, many = (
            error_of(weight, dictionary_fitter(weight, Metric(), learner(i))(10, 3).dense(), Metric()) for i in (0, 15)
        )
        assert many < none


def test_zero_and_rank_deficient_weights():
    for weight in (torch.zeros(6, 5), torch.ones(6, 5), torch.eye(6)[:, :5]):
        for learner in LEARNERS.values():
            found = dictionary_fitter(weight, Metric(inputs=torch.zeros(5, 5)), learner)(3, 2).dense()
            assert torch.isfinite(found).all()


@pytest.mark.parametrize(("atoms", "nonzeros"), [(0, 1), (6, 1), (3, 4), (3, 0)])
def test_sizes_beyond_the_matrix(atoms, nonzeros):
    with pytest.raises(EckartError, match=rf"a dictionary of {atoms} atoms with {nonzeros} non-zeros per row"):
        dictionary_fitter(torch.ones(4, 5), Metric(), LEARNERS["compot"])(atoms, nonzeros)


def test_sizes_within_a_share():
    family = dictionary_family(LEARNERS["rocket"], 2.0)
    for shape in ((192, 192), (512, 192), (192, 512)):
        sizes = family.sizes(shape)
        assert sizes == sorted(set(sizes))
        for size in sizes:
            assert family.numbers(shape, size) < family.numbers(shape, size + 1)
        assert family.size_within(shape, 0) == 0
