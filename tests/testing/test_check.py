"""Each law rejects the map that breaks it, and `check_map` says which law, which case and what differed."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.maps import Dense, Diagonal, LinearMap, Sum, linear_map, require
from eckart.testing import LAWS, Case, LawError, check_law, check_map
from eckart.testing.broken import BROKEN, RoundsItsScale, SlightlyTooLarge, _Right
from eckart.testing.case import expect_same, normal
from eckart.testing.counting import count


def test_every_law_has_a_broken_map():
    assert set(BROKEN) == set(LAWS)


@pytest.mark.parametrize("law", LAWS)
def test_a_law_rejects_its_broken_map(law: str):
    with pytest.raises(LawError, match=f"law {law!r} is broken by"):
        check_law(law, BROKEN[law]())


def test_the_base_of_the_broken_maps_is_right():
    """Otherwise a law might reject a broken map for another reason than the one named."""
    assert check_map(_Right(normal(3, 4))) == len(LAWS)


@linear_map
class Shift(LinearMap):
    """y_i = gain x_{(i + by) mod n}: a map written outside of the package, with a number, a flag and a tensor."""

    gain: Tensor
    by: int
    flipped: bool = False

    def __post_init__(self) -> None:
        require(self.gain.ndim == 1, "Shift", f"a gain of shape {tuple(self.gain.shape)}", "a vector")

    @property
    def shape(self) -> tuple[int, int]:
        return self.gain.shape[0], self.gain.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.roll(x * self.gain, -self.by, -1) if self.flipped else torch.roll(x, -self.by, -1) * self.gain

    @property
    def T(self) -> LinearMap:
        return Shift(self.gain, -self.by, not self.flipped)

    def flops(self, tokens: int = 1) -> int:
        return tokens * self.gain.shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_of_ones_own_passes(dtype: torch.dtype):
    gain = normal(5).to(dtype)
    matrix = gain[:, None] * torch.eye(5, dtype=dtype).roll(2, 1)
    assert check_map((Shift(gain, 2), matrix)) == len(LAWS)
    assert check_map([Shift(gain, 2), Shift(gain[:1], 0)], laws=["apply", "adjoint"]) == 4
    assert check_map(lambda: Sum((Shift(gain, 1), Diagonal(gain))), laws=["save"], families=[Shift]) == 1


def test_the_message_names_law_case_and_difference():
    with pytest.raises(LawError) as caught:
        check_map([Dense(normal(2, 2)), SlightlyTooLarge(normal(2, 3))], laws=["apply"])
    message = str(caught.value)
    assert "law 'apply'" in message
    assert "instance 1, SlightlyTooLarge[2x3" in message
    assert "ratio 1.01" in message


def test_a_wrong_matrix_is_noticed():
    with pytest.raises(LawError, match="differs in 6 of 6 entries"):
        check_map((Dense(normal(2, 3)), normal(2, 3) + 1), laws=["dense"])


def test_errors_from_inside_are_named():
    @linear_map
    class Fails(_Right):
        def __call__(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.mT)

    with pytest.raises(LawError, match=r"law 'apply' is broken by instance 0, Fails.*RuntimeError: ") as caught:
        check_map((Fails(normal(2, 3)), normal(2, 3)), laws=["apply"])
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("instances", "laws", "message"),
    [
        ([], None, "got 0 instances"),
        (Dense(normal(2, 2)), ["no_such"], r"the laws \['no_such'\]; give at least one instance and any of apply"),
        (Dense(normal(2, 2)), [], r"the laws \[\]"),
        ([normal(2, 2)], None, "instance 0 is a Tensor; give linear maps"),
    ],
)
def test_nothing_to_check_is_an_error(instances, laws, message: str):
    with pytest.raises(EckartError, match=message):
        check_map(instances, laws=laws)


def test_inner_families_are_found():
    assert check_map(Sum((RoundsItsScale(normal(2, 2), 2.0),)), laws=["save"]) == 1


def test_expect_same_fails_on_nan_shape_and_value():
    one = torch.ones(3)
    expect_same("x", one, one)
    expect_same("x", one[:0], one[:0])
    for wrong in (one * float("nan"), one[:2], one + 1e-5):
        with pytest.raises(LawError, match="x "):
            expect_same("x", wrong, one)


def test_operations_are_counted():
    a, b = normal(3, 4), normal(4, 5)
    assert count(lambda: a @ b) == 2 * 3 * 4 * 5
    assert count(lambda: a * a) == 12
    assert count(lambda: a.sum(1)) == 12
    assert count(lambda: torch.arange(5) + 1) == 0
    assert count(a.mT.clone) == 0
    assert count(lambda: torch.zeros(3).index_add(0, torch.tensor([0, 1]), torch.ones(2))) == 2


def test_needs_no_test_tools():
    code = "import sys; sys.modules.update(pytest=None, hypothesis=None); import eckart.testing, eckart.testing.broken"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_case_keeps_its_inputs():
    case = Case("c", Dense(normal(2, 3)), normal(2, 3))
    assert case.inputs(4).equal(case.inputs(4))
    assert case.inputs(4).shape == (4, 3)
