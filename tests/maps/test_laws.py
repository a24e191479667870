"""Every law on every case of every family; what is particular to one map is in test_families.py."""

import pytest

from eckart.maps import FAMILIES
from eckart.testing import LAWS, Case, cases, check_law
from eckart.testing.cases import MAKERS
from eckart.testing.laws import TRACED

CASES = cases()
FIRST = {next(case.name for case in cases(family)) for family in MAKERS}

# The number of (law, case) pairs only grows: a drop means that a battery no longer runs.
PAIRS = 2380


def _pairs():
    for case in CASES:
        for law in LAWS:
            # Compiling takes a quarter of a second; one case of each family covers each `__call__`.
            slow = law == "compiled" and case.name not in FIRST
            yield pytest.param(law, case, id=f"{law}-{case.name}", marks=[pytest.mark.slow] if slow else [])


# torch warns whenever a linear layer of rank 0 is made, although nothing is initialized.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("law", "case"), list(_pairs()))
def test_law(law: str, case: Case):
    check_law(law, case)


def test_no_battery_is_lost():
    assert len(CASES) * len(LAWS) >= PAIRS
    assert set(TRACED) <= set(LAWS)


def test_every_family_has_cases():
    assert set(FAMILIES) <= set(MAKERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_cases_are_varied(family: str):
    """Identity-like cases hide mistakes: each family has an asymmetric, a 1 x 1 and a rank-deficient case."""
    matrices = [case.matrix for case in cases(family)]
    assert all(type(case.map) is FAMILIES[family] for case in cases(family))
    assert any(w.shape == (1, 1) for w in matrices)
    if family not in ("Diagonal",):
        assert any(w.shape[0] != w.shape[1] or not w.equal(w.mT) for w in matrices)
    square = ("Diagonal", "Permutation", "Householder", "Cayley")
    if family not in (*square, "Selection"):
        assert any(w.shape[0] > w.shape[1] for w in matrices)
    if family not in (*square, "Placement"):
        assert any(w.shape[0] < w.shape[1] for w in matrices)


def test_cases_are_the_same_for_the_same_seed():
    first, second, other = cases("Dense", seed=1), cases("Dense", seed=1), cases("Dense", seed=2)
    assert first[0].map == second[0].map
    assert first[0].map != other[0].map
