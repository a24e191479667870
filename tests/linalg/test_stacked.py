"""Bounds on truncating matrices together hold for every rank, in the order the theory gives, and sketches certify."""

import os
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from eckart.errors import EckartError
from eckart.linalg import growth_bound, lower_bound, residual_bound, sketch, stacked, union_bound

SHARED = Path(os.environ.get("ECKART_SHARED", Path(__file__).parents[3] / "shared"))
MODELS = {"stories260k": Path(str(files("eckart"))) / "demo/stories260k", "stories3m": SHARED / "models/stories3m"}


def exact(blocks: list[torch.Tensor], rank: int) -> float:
    """The least squared error of all blocks with one right factor of that rank, by LAPACK."""
    return float(torch.linalg.svdvals(torch.cat(blocks).double())[rank:].square().sum())


@st.composite
def stacks(draw) -> list[torch.Tensor]:
    """Matrices of one width with decaying spectra that agree in direction fully, partly, or not at all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    n, count = draw(st.integers(1, 12)), draw(st.integers(2, 4))
    agreement, decay = draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.sampled_from([0.0, 1.0, 3.0]))
    common = torch.randn(n, n, generator=generator, dtype=torch.float64)
    out = []
    for _ in range(count):
        own = torch.randn(n, n, generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(agreement * common + (1 - agreement) * own)[0]
        m = draw(st.integers(1, 14))
        left = torch.randn(m, n, generator=generator, dtype=torch.float64)
        scale = draw(st.sampled_from([1.0, 0.1, 0.0]))
        out.append(scale * left * torch.arange(1, n + 1).double() ** -decay @ q.mT)
    return out


@settings(deadline=None, max_examples=150)
@given(stacks(), st.integers(0, 14))
def test_bounds_hold_and_are_ordered(blocks, rank):
    known = [sketch(block) for block in blocks]
    truth = exact(blocks, rank)
    slack = 1e-9 * (sum(float(b.square().sum()) for b in blocks) + 1e-300)
    assert lower_bound(known, rank) <= truth + slack
    assert truth <= union_bound(known, rank) + slack
    assert union_bound(known, rank) <= growth_bound(known, rank) + slack
    pair = exact(blocks[:2], rank)
    for splits in (1, 4):
        bound = residual_bound(known[0], known[1], rank, splits=splits)
        assert pair - slack <= bound <= union_bound(known[:2], rank) + slack


@settings(deadline=None, max_examples=150)
@given(stacks(), st.integers(1, 8))
def test_a_sketch_certifies_the_error_of_what_was_stacked(blocks, kept):
    joint = sketch(blocks[0], kept)
    for block in blocks[1:]:
        joint = stacked(joint, sketch(block, kept), kept)
    slack = 1e-9 * (joint.energy + 1e-300)
    for rank in range(kept + 1):
        truth = exact(blocks, rank)
        assert joint.error(rank) - joint.discarded - slack <= truth <= joint.error(rank) + slack
    # truncated sketches still give valid upper bounds
    truncated = [sketch(block, kept) for block in blocks]
    assert exact(blocks, kept) <= min(union_bound(truncated, kept), growth_bound(truncated, kept)) + slack
    assert exact(blocks[:2], kept) <= residual_bound(truncated[0], truncated[1], kept) + slack


def test_known_cases():
    wide = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    agrees, differs = torch.diag(torch.tensor([3.0, 0.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 3.0]))
    known = {name: sketch(matrix) for name, matrix in (("wide", wide), ("agrees", agrees), ("differs", differs))}
    assert residual_bound(known["wide"], known["agrees"], 1) == pytest.approx(exact([wide, agrees], 1)) == 5.0
    assert union_bound([known["wide"], known["agrees"]], 1) == pytest.approx(14.0)  # cannot tell that they agree
    # the direction that both have, third in the first block, is counted as lost there
    assert residual_bound(known["wide"], known["differs"], 2) == pytest.approx(exact([wide, differs], 2) + 1) == 5.0
    assert growth_bound([known["wide"], known["differs"]], 2) == pytest.approx(30 - 16 - 4)
    assert stacked(known["wide"], known["differs"]).values.tolist() == pytest.approx([16.0, 10.0, 4.0])
    assert sketch(wide, 1).discarded == pytest.approx(5.0)
    assert known["wide"].scaled(2).error(1) == pytest.approx(20.0)


def test_matrices_of_other_widths_are_refused():
    with pytest.raises(EckartError, match="matrices of 3 and 2 columns cannot be stacked; they need as many"):
        stacked(sketch(torch.eye(3)), sketch(torch.eye(2)))


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("projection", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_on_real_layers_residuals_are_measurably_tighter(model, projection):
    if not MODELS[model].is_dir():
        pytest.skip(f"needs {MODELS[model]}")
    tensors = load_file(MODELS[model] / "model.safetensors")
    weights = [t.double() for name, t in sorted(tensors.items()) if name.endswith(f"{projection}.weight")]
    blocks, rank = weights[1:3], min(weights[0].shape) // 3
    known = [sketch(block) for block in blocks]
    truth, total = exact(blocks, rank), sum(float(b.square().sum()) for b in blocks)
    growth, union, residual = growth_bound(known, rank), union_bound(known, rank), residual_bound(*known, rank)
    assert lower_bound(known, rank) <= truth <= residual <= union <= growth <= total
    assert growth - residual > 0.02 * total
    # the estimate that keeps twice the rank is within a hundredth of the truth
    joint = stacked(*(sketch(block, 2 * rank) for block in blocks), 2 * rank)
    assert truth <= joint.error(rank) <= truth + 0.01 * total
