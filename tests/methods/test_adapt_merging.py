"""Merging under a metric of data: outputs nearer than the Frobenius norm's, structures kept, the base restored."""

import pytest
import torch
from torch import Tensor, nn

import eckart
from eckart.errors import EckartError
from eckart.fit.quantize import Coding, quantize
from eckart.hosts import host, map_of
from eckart.maps import Dense as DenseMap
from eckart.maps import LinearMap, LowRank, Masked, bitmap, n_of_m, packed, sparse

M, N = 16, 20


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W = normal(M, N, seed=0)
KEEP = normal(M, N, seed=1) > 0.3
BASES: dict[str, LinearMap] = {
    "low rank": LowRank(normal(M, 4, seed=2), normal(4, N, seed=3)),
    "wide low rank": LowRank(normal(M, 15, seed=2), normal(15, N, seed=3)),
    "2:4": n_of_m(W, 2, 4),
    "bitmap": bitmap(W, 6),
    "sparse": sparse(W * KEEP),
    "masked": Masked(DenseMap(W), KEEP),
    "masked by bits": Masked(DenseMap(W), packed(KEEP)),
    "codes": quantize(W, Coding(3, 20)),
}
# Inputs of which some directions are ten times as large, and fewer of them than there are directions.
INPUTS = {
    "many": normal(200, N, seed=4) @ (normal(N, N, seed=5) * torch.logspace(0, -1.5, N)),
    "few": normal(7, N, seed=6) * torch.logspace(0.5, -0.5, N),
}


class Model(nn.Module):
    def __init__(self, base: LinearMap) -> None:
        super().__init__()
        self.layer = host(base.apply(torch.clone), normal(M, seed=7))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(input_ids)


def adapted(base: LinearMap) -> nn.Module:
    model = eckart.adapt(Model(base), "lora", targets=["layer"], rank=3)
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=10 + seed))
    return model


@pytest.mark.parametrize("seen", INPUTS)
@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_outputs_are_never_farther_than_those_of_the_nearest_weights(kind: str, seen: str):
    model, x = adapted(BASES[kind]), INPUTS[seen]
    handle = eckart.adapters(model)
    layer, before, wanted = handle.layers["layer"], map_of(handle.layers["layer"].base).dense(), model(x)
    start = x @ before.mT + layer.offset
    off, lost = {}, {}
    for data in (None, [x[:3], x[3:]]):
        lost[data is None] = handle.merge(data)["layer"]
        merged = map_of(layer._merged[0])
        off[data is None] = float((model(x) - wanted).norm() / (start - wanted).norm())
        assert type(merged) is type(BASES[kind])
        assert merged.nbytes == BASES[kind].nbytes
        if kind in ("2:4", "bitmap", "sparse", "masked", "masked by bits"):
            assert not (merged.dense()[BASES[kind].dense() == 0]).any()
        handle.unmerge()
        assert torch.equal(model(x), wanted)
        assert torch.equal(map_of(layer.base).dense(), before)
    assert off[False] <= off[True] + 1e-6
    assert off[False] < 0.95 * off[True] or kind == "codes"
    assert lost[False] == pytest.approx(off[False], rel=0.05)


@pytest.mark.parametrize("kind", ["low rank", "2:4", "sparse", "masked", "masked by bits"])
@torch.no_grad()
def test_no_map_of_the_structure_is_nearer_on_the_data(kind: str):
    """Brute force: rank k by whitening with a Cholesky factor and plain SVD, a support by a dense solve of each row."""
    model, x = adapted(BASES[kind]), INPUTS["many"]
    handle = eckart.adapters(model)
    full = handle.layers["layer"].held_map().dense().double()
    second = (x.double().mT @ x.double()) / len(x)
    if kind == "low rank":
        root = torch.linalg.cholesky(second)
        left, values, right = torch.linalg.svd(full @ root, full_matrices=False)
        best = (left[:, :4] * values[:4]) @ right[:4] @ torch.linalg.inv(root)
    else:
        best = torch.zeros_like(full)
        for i, row in enumerate(BASES[kind].dense() != 0):
            best[i, row] = torch.linalg.solve(second[row][:, row], (second @ full[i])[row])
    handle.merge([x])
    got = map_of(handle.layers["layer"]._merged[0]).dense().double()
    least, found = (((full - other) @ second * (full - other)).sum() for other in (best, got))
    assert least > 0
    assert found < 1.02 * least


@torch.no_grad()
def test_folding_under_data_is_merging_under_data():
    x = INPUTS["many"]
    model = adapted(BASES["low rank"])
    eckart.adapters(model).merge([x])
    folded = eckart.adapters(adapted(BASES["low rank"])).fold([x])
    assert isinstance(map_of(folded.layer), LowRank)
    assert torch.equal(folded(x), model(x))


def test_data_that_cannot_be_used_changes_nothing():
    model = adapted(BASES["low rank"])
    handle = eckart.adapters(model)
    for data, message in (([], "never reached layer"), ([torch.full((3, N), torch.nan)], "NaN or Inf")):
        with pytest.raises(EckartError, match=message):
            handle.merge(data)
        assert not handle.layers["layer"].is_merged
