"""A factored embedding looks up what its dense table holds, and a tied head multiplies by that same table."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from eckart.errors import EckartError
from eckart.fit.quantize import Coding, quantize
from eckart.hosts import EmbeddingHost, TiedHead, embedding_host, host, map_of
from eckart.maps import (
    Blocks,
    Dense,
    Interleaved,
    LinearMap,
    LowRank,
    Permutation,
    Pivoted,
    Product,
    Quantized,
    pack,
    pivot,
)

VOCABULARY, WIDTH, RANK = 23, 10, 4


def maps() -> dict[str, LowRank | Pivoted]:
    torch.manual_seed(2)
    map_ = LowRank(torch.randn(VOCABULARY, RANK), torch.randn(RANK, WIDTH))
    return {"lowrank": map_, "pivoted": pivot(map_, "columns")}


@pytest.fixture(params=list(maps()))
def map_(request):
    return maps()[request.param]


def test_round_trip_shares_the_table(map_):
    module = EmbeddingHost(map_)
    assert module.held_map() == map_
    rows = map_.up if isinstance(map_, LowRank) else map_.basis
    assert module.table.weight.data_ptr() == rows.data_ptr()
    torch.testing.assert_close(module.dense(), map_.dense())
    assert (module.num_embeddings, module.embedding_dim) == (VOCABULARY, WIDTH)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 0)])
def test_lookup(map_, shape):
    ids = torch.randint(0, VOCABULARY, shape)
    torch.testing.assert_close(EmbeddingHost(map_)(ids), map_.dense()[ids], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [None, torch.arange(VOCABULARY).float()])
def test_tied_head(map_, bias):
    embedding = EmbeddingHost(map_)
    head = TiedHead(embedding, bias)
    hidden = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(head(hidden), nn.functional.linear(hidden, map_.dense(), bias), atol=1e-5, rtol=1e-5)
    assert (head.in_features, head.out_features) == (WIDTH, VOCABULARY)


def test_tied_head_follows_its_embedding(map_):
    embedding = EmbeddingHost(map_)
    head, hidden = TiedHead(embedding), torch.randn(2, WIDTH)
    assert not list(head.parameters())
    head(hidden)
    with torch.no_grad():
        embedding.table.weight.mul_(3)
        embedding.rest.weight.add_(1)
        if embedding.order is not None:
            embedding.order.copy_(embedding.order.flip(0))
    torch.testing.assert_close(head(hidden), hidden @ embedding.dense().mT, atol=1e-5, rtol=1e-5)
    if embedding.order is not None:
        embedding.order = embedding.order.roll(1)
    torch.testing.assert_close(head(hidden), hidden @ embedding.dense().mT, atol=1e-5, rtol=1e-5)


def test_one_owner_in_a_model_and_in_its_copy(map_):
    embedding = EmbeddingHost(map_)
    model = nn.ModuleDict({"embedding": embedding, "head": TiedHead(embedding)})
    names = {"embedding.table.weight", "embedding.rest.weight"} | (
        {"embedding.order"} if isinstance(map_, Pivoted) else set()
    )
    assert set(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert twin["head"]._embedding[0] is twin["embedding"]
    twin.double()
    assert twin["head"](torch.randn(1, WIDTH, dtype=torch.float64)).dtype == torch.float64


def test_gradients_of_both_uses_add_up(map_):
    embedding = EmbeddingHost(map_)
    head, ids, hidden = TiedHead(embedding), torch.tensor([1, 5, 1]), torch.randn(3, WIDTH)
    (embedding(ids).sum() + head(hidden).square().sum()).backward()
    table = map_.dense().requires_grad_()
    (table[ids].sum() + (hidden @ table.mT).square().sum()).backward()
    down = embedding.held_map().lowrank() if isinstance(map_, Pivoted) else embedding.held_map()
    expected = table.grad @ down.down.detach().mT
    torch.testing.assert_close(embedding.table.weight.grad, expected, atol=1e-3, rtol=1e-4)


def test_compiled_without_breaks(map_):
    torch.compiler.reset()
    embedding = EmbeddingHost(map_)
    model = nn.Sequential(embedding, TiedHead(embedding))
    ids = torch.randint(0, VOCABULARY, (2, 3))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_offloaded(map_):
    embedding = EmbeddingHost(map_)
    ids, hidden = torch.tensor([[1, 2]]), torch.randn(1, 2, WIDTH)
    cpu_offload(embedding, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(embedding(ids), map_.dense()[ids], atol=1e-5, rtol=1e-5)
        with pytest.raises(EckartError, match="tied head needs its embedding in memory"):
            TiedHead(embedding)(hidden)


def test_rank_zero():
    embedding = EmbeddingHost(LowRank(torch.zeros(VOCABULARY, 0), torch.zeros(0, WIDTH)))
    assert embedding(torch.tensor([1, 2])).tolist() == [[0.0] * WIDTH] * 2
    assert TiedHead(embedding)(torch.randn(2, WIDTH)).tolist() == [[0.0] * VOCABULARY] * 2


@pytest.mark.parametrize(
    "bad", [Dense(torch.randn(6, 4)), pivot(LowRank(torch.randn(6, 2), torch.randn(2, 4)), "rows")]
)
def test_other_maps_are_refused(bad):
    with pytest.raises(EckartError, match="an embedding needs a low-rank or column-pivoted map, got"):
        EmbeddingHost(bad)


@torch.no_grad()
def test_lookup_and_head_follow_their_factors_without_gradients(map_):
    embedding = EmbeddingHost(map_).eval()
    head, hidden, ids = TiedHead(embedding), torch.randn(2, WIDTH), torch.arange(VOCABULARY)
    for leaf in (embedding.table, embedding.rest):
        for _ in range(2):
            table = embedding.held_map().dense()
            torch.testing.assert_close(embedding(ids), table, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(head(hidden), hidden @ table.mT, atol=1e-5, rtol=1e-5)
            leaf.weight.mul_(2)


def test_a_copy_has_its_own_temporary_table(map_):
    embedding = EmbeddingHost(map_).eval()
    with torch.no_grad():
        embedding(torch.tensor([0]))
        copied = copy.deepcopy(embedding)
        copied.table.weight.zero_()
        assert not copied(torch.tensor([0])).any()
        assert embedding(torch.tensor([0])).any()


def codes(rows: int, columns: int, bits: int) -> Quantized:
    numbers = torch.randint(2**bits, (rows, columns))
    return Quantized(pack(numbers, bits), torch.rand(rows, 1) + 0.1, torch.randn(rows, 1), None, columns, bits, columns)


def quantized_tables() -> list[LinearMap]:
    torch.manual_seed(0)
    order = torch.randperm(WIDTH, dtype=torch.int32)
    pivots = Blocks(((Permutation(torch.arange(4)), Dense(torch.randn(4, WIDTH - 4))),))
    rest = codes(4, WIDTH, 3)
    return [
        codes(VOCABULARY, WIDTH, 4),
        Product((codes(VOCABULARY, 4, 4), rest)),
        Product((codes(VOCABULARY, 4, 8), pivots, Permutation(order))),
    ]


@pytest.mark.parametrize("map_", quantized_tables(), ids=["alone", "low rank", "pivoted"])
def test_quantized_tables_are_looked_up_and_tied(map_):
    embedding = embedding_host(map_, padding_idx=1)
    ids, hidden = torch.randint(VOCABULARY, (2, 5)), torch.randn(2, 3, WIDTH)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(embedding(ids), map_.dense()[ids], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(TiedHead(embedding)(hidden), hidden @ map_.dense().mT, atol=1e-4, rtol=1e-4)
    held = embedding.held_map()
    assert held == map_
    assert all(t.data_ptr() == map_.tensors()[name].data_ptr() for name, t in held.tensors().items())
    assert embedding.padding_idx == 1


def test_a_table_of_codes_by_columns_is_refused():
    with pytest.raises(EckartError, match="one row of codes per token"):
        embedding_host(codes(WIDTH, VOCABULARY, 4).T)


def test_rows_of_several_widths_are_looked_up():
    weight, which = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), [0, 1, 1, 0, 1, 0, 0, 1, 1]
    chosen = torch.tensor(which, dtype=torch.uint8)
    parts = tuple(
        quantize(weight[chosen == i], Coding(bits, 4), axis="rows").to(torch.float32) for i, bits in enumerate((5, 2))
    )
    map_ = Interleaved(parts, chosen)
    module, ids = embedding_host(map_), torch.tensor([[8, 0, 3], [3, 1, 7]])
    assert map_of(module.table) == map_ == module.held_map()
    torch.testing.assert_close(module(ids), map_.dense()[ids])
    hidden = torch.randn(2, 5)
    torch.testing.assert_close(module.logits(hidden), hidden @ map_.dense().mT)
    with torch.no_grad():
        torch.testing.assert_close(module.logits(hidden), hidden @ map_.dense().mT)
        module.table.which.copy_(chosen.flip(0))
        torch.testing.assert_close(module(ids), module.held_map().dense()[ids])
    with pytest.raises(EckartError, match="needs one row of codes per token"):
        embedding_host(Interleaved((parts[0].T.T, Dense(weight[:1])), torch.tensor([0, 0, 0, 0, 1], dtype=torch.uint8)))


@torch.no_grad()
def test_rows_of_several_widths_are_dequantized_once_and_anew_after_any_change():
    parts = (codes(3, 6, 2), codes(4, 6, 4))
    layer, x = host(Interleaved(parts, torch.tensor([0, 1, 1, 0, 1, 0, 1], dtype=torch.uint8))), torch.randn(2, 6)

    def gives_its_map() -> bool:
        return torch.allclose(layer(x), map_of(layer)(x), atol=1e-5)

    assert gives_its_map()
    kept = layer.temporary_dense()
    assert kept is not None
    assert layer.temporary_dense() is kept
    layer.get_submodule("1").scale.mul_(2)
    assert gives_its_map()
    layer.get_submodule("0").codes.bitwise_xor_(1)
    assert gives_its_map()
    layer.which.copy_(layer.which.flip(0))
    assert gives_its_map()
    other = host(codes(3, 6, 2))
    other.scale.mul_(3)
    layer.set_submodule("0", other)
    assert gives_its_map()
    calls = []
    other.register_forward_hook(lambda *_: calls.append(1))
    assert gives_its_map()
    assert calls == [1]
    assert layer.temporary_dense() is None
