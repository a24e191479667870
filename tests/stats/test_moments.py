"""Accumulated moments are those of all vectors at once, and name the layer when something is wrong with them."""

import pytest
import torch

from eckart.errors import EckartError
from eckart.stats import CrossSum, Gradients, GradientSum, Moments, MomentSum, moments, token_counts


@pytest.fixture(params=["float64", "float32"])
def accumulation(request, monkeypatch) -> float:
    """The relative accuracy of the sums, below and above the width where they are kept in float32."""
    if request.param == "float32":
        monkeypatch.setattr(moments, "WIDE_ACCUMULATION", 3)
    return 1e-6


def test_sums_of_batches_are_the_moments_of_all(accumulation):
    x = torch.randn(7, 11, 6) + 2
    total = MomentSum(6)
    for part in x.split(3):
        total.add(part)
    got, rows = total.result("a layer"), x.reshape(-1, 6).double()
    assert got.count == 77
    torch.testing.assert_close(got.mean, rows.mean(0), rtol=accumulation, atol=0)
    torch.testing.assert_close(got.mean_abs, rows.abs().mean(0), rtol=accumulation, atol=0)
    torch.testing.assert_close(got.second.double(), rows.mT @ rows / 77, rtol=accumulation, atol=1e-6)
    torch.testing.assert_close(got.norms.double(), rows.norm(dim=0), rtol=accumulation, atol=0)


def test_cross_sums_join_both_inputs(accumulation):
    x, shifted = torch.randn(5, 8, 6), torch.randn(5, 8, 6) + 1
    total = CrossSum(6)
    for a, b in zip(x.split(2), shifted.split(2), strict=True):
        total.add(b, a)
    got = total.result("a layer")
    rows, hats = x.reshape(-1, 6).double(), shifted.reshape(-1, 6).double()
    torch.testing.assert_close(got.cross.double(), rows.mT @ hats / 40, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.original.second.double(), rows.mT @ rows / 40, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.shifted.mean, hats.mean(0), rtol=1e-5, atol=1e-6)


def test_unpaired_cross_sums_follow_the_compressed_model_only():
    shifted, total = torch.randn(5, 8, 6), CrossSum(6, paired=False)
    total.add(shifted)
    got, alone = total.result("a layer"), MomentSum(6)
    alone.add(shifted)
    assert torch.equal(got.shifted.second, alone.result("x").second)
    assert got.original is None
    assert got.cross is None


@pytest.mark.parametrize("paired", [True, False])
def test_merged_sums_are_the_sum_of_everything_and_leave_their_parts_alone(accumulation, paired):
    x, shifted = torch.randn(6, 8, 6), torch.randn(6, 8, 6) + 1
    whole, parts = CrossSum(6, paired=paired), [CrossSum(6, paired=paired) for _ in range(3)]
    for i, (a, b) in enumerate(zip(x, shifted, strict=True)):
        for total in (whole, parts[i % 3]):
            total.add(b, a if paired else None)
    got, expected = CrossSum.merged(parts).result("a layer"), whole.result("a layer")
    assert got.shifted.count == expected.shifted.count == 48
    torch.testing.assert_close(got.shifted.second, expected.shifted.second)
    torch.testing.assert_close(got.shifted.mean, expected.shifted.mean)
    torch.testing.assert_close(parts[0].result("a layer").shifted.mean, shifted[::3].reshape(-1, 6).double().mean(0))
    if paired:
        torch.testing.assert_close(got.cross, expected.cross)
        torch.testing.assert_close(got.original.second, expected.original.second)
    else:
        assert got.cross is got.original is None


def test_gradient_sums_hold_the_second_moment_and_the_row_fisher(accumulation):
    x, gradient = torch.randn(4, 7, 6), torch.randn(4, 7, 5)
    total = GradientSum(5)
    total.add(x[:3], gradient[:3])
    total.add(x[3:], gradient[3:])
    got, rows = total.result("a layer"), gradient.reshape(-1, 5).double()
    fisher = torch.stack([(g.mT @ i).double().square().sum(1) for g, i in zip(gradient, x, strict=True)]).mean(0)
    assert got.count == 28
    torch.testing.assert_close(got.second.double(), rows.mT @ rows / 28, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.row_fisher, fisher, rtol=1e-5, atol=0)


def test_many_small_additions_lose_nothing():
    total = MomentSum(2)
    for _ in range(2000):
        total.add(torch.tensor([[1.0, 1e-4]]))
    torch.testing.assert_close(total.result("x").second[1, 1], torch.tensor(1e-8).double(), rtol=1e-6, atol=0)


def test_half_precision_products_are_formed_in_float32():
    x = torch.full((64, 2), 300.0, dtype=torch.float16)  # 300^2 * 64 overflows float16
    total = MomentSum(2)
    total.add(x)
    assert total.result("x").second[0, 1] == 90000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad):
    x = torch.ones(2, 3, 4)
    x[1, 2, 3] = bad
    inputs, gradients = MomentSum(4), GradientSum(4)
    inputs.add(x)
    gradients.add(torch.ones(2, 3, 5), x)
    with pytest.raises(EckartError, match=r"inputs of model.layers.3.mlp hold NaN or Inf; check the weights"):
        inputs.result("model.layers.3.mlp")
    with pytest.raises(EckartError, match=r"gradients at model.layers.3.mlp hold NaN or Inf; check the weights"):
        gradients.result("model.layers.3.mlp")


def test_a_layer_no_input_reached_is_named():
    with pytest.raises(EckartError, match=r"no inputs reached experts\.7"):
        MomentSum(4).result("experts.7")


def test_moments_survive_saving():
    total, gradients = MomentSum(3), GradientSum(2)
    total.add(torch.randn(5, 3))
    gradients.add(torch.randn(1, 5, 3), torch.randn(1, 5, 2))
    for kind, value in ((Moments, total.result("x")), (Gradients, gradients.result("x"))):
        back = kind.of(value.tensors())
        assert back.count == value.count
        assert all(torch.equal(a, b) for a, b in zip(back.tensors().values(), value.tensors().values(), strict=True))


def test_tokens_are_counted_over_all_samples():
    counts = token_counts([torch.tensor([[1, 1, 4]]), torch.tensor([[0], [4]])], 6)
    assert counts.tolist() == [1, 2, 0, 0, 2, 0]
