"""What is particular to one map: constructors from a matrix, choices, errors; the laws are in test_laws.py."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import CostWarning, EckartError
from eckart.maps import (
    FAMILIES,
    NM,
    STORAGES,
    Bitmap,
    Blocks,
    Dense,
    Diagonal,
    Fact,
    Householder,
    LinearMap,
    LowRank,
    Masked,
    Permutation,
    Pivoted,
    Product,
    RowNormalized,
    Scaled,
    Sparse,
    Sum,
    bitmap,
    blank,
    facts,
    from_spec,
    linear_map,
    lowrank_numbers,
    n_of_m,
    pivot,
    pivoted_numbers,
    rank_bound,
    row_norms,
    simplify,
    sparse,
    storage,
    zero_map,
)
from eckart.testing import check_map
from eckart.testing.case import normal

sizes = st.integers(1, 12)
seeds = st.integers(0, 10**6)


@given(sizes, sizes, seeds, st.floats(0, 1))
def test_sparse_keeps_the_non_zeros(m: int, n: int, seed: int, share: float):
    w = normal(m, n, seed=seed)
    w[torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < share] = 0
    map_ = sparse(w)
    assert map_.dense().equal(w)
    assert map_.numbers == int((w != 0).sum())
    assert map_.T.dense().equal(w.mT)


@given(sizes, st.integers(1, 4), st.integers(1, 6), seeds)
def test_n_of_m_keeps_the_largest_of_every_group(m: int, groups: int, period: int, seed: int):
    w = normal(m, groups * period, seed=seed)
    for keep in range(1, period + 1):
        kept = n_of_m(w, keep, period).dense()
        assert ((kept == 0) | (kept == w)).all()
        by_group = w.view(m, groups, period).abs().sort(2, descending=True).values[..., :keep]
        assert torch.allclose(kept.square().sum(1), by_group.square().sum((1, 2)))


@pytest.mark.parametrize(
    ("keep", "period", "message"),
    [(2, 3, "multiple of the period"), (0, 4, "0 < N"), (5, 4, "0 < N"), (1, 512, "multiple|0 < N")],
)
def test_n_of_m_refuses(keep: int, period: int, message: str):
    with pytest.raises(EckartError, match=message):
        n_of_m(normal(3, 4), keep, period)


@pytest.mark.parametrize("axis", ["rows", "columns", None])
@given(sizes, sizes, st.integers(0, 12), seeds)
def test_pivot_is_the_same_matrix_in_fewer_numbers(axis: str | None, m: int, n: int, k: int, seed: int):
    k = min(k, m, n)
    factors = LowRank(normal(m, k, seed=seed), normal(k, n, seed=seed + 1))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        found = pivot(factors.to(dtype), axis)
        wanted = factors.to(dtype).to(torch.float64).dense()
        assert found.dtype == dtype
        assert torch.linalg.norm(found.dense().double() - wanted) <= tolerance * torch.linalg.norm(wanted)
        assert found.numbers == pivoted_numbers((m, n), k) == k * (m + n - k) <= m * n
        assert found.axis == (axis or ("rows" if m <= n else "columns"))
        assert found.coefficients.numel() == 0 or float(found.coefficients.abs().max()) <= 1.06
        assert found.nbytes == found.numbers * found.basis.element_size() + 4 * found.order.shape[0]


def test_pivot_refuses_more_than_the_shorter_side():
    with pytest.raises(EckartError, match="rank 3 of a 4 x 2 map"):
        pivot(LowRank(normal(4, 3), normal(3, 2)))


def test_pivot_refuses_a_deficient_factor():
    up = normal(4, 2)
    up[:, 1] = 0
    with pytest.raises(EckartError, match="truncate the map first"):
        pivot(LowRank(up, normal(2, 4)), "rows")


@pytest.mark.parametrize("name", STORAGES)
@given(sizes, sizes, st.integers(-5, 200) | st.floats(-5, 200))
def test_largest_rank_is_the_largest_that_fits(name: str, m: int, n: int, numbers: float):
    found = STORAGES[name].largest_rank((m, n), numbers)
    fitting = [k for k in range(min(m, n) + 1) if STORAGES[name].numbers((m, n), k) <= numbers]
    assert found == max(fitting, default=0)


@pytest.mark.parametrize("name", STORAGES)
def test_storage_states_what_its_map_holds(name: str):
    for m, n, k in ((7, 5, 3), (5, 7, 2), (4, 4, 4), (3, 3, 0)):
        built = STORAGES[name].build(LowRank(normal(m, k), normal(k, n)))
        assert built.numbers == STORAGES[name].numbers((m, n), k)
        assert built.nbytes == 8 * built.numbers + STORAGES[name].index_bytes((m, n), 1)


def test_unknown_storage_lists_the_known():
    with pytest.raises(EckartError, match="'packed'; choose one of lowrank, pivoted"):
        storage("packed")


def test_numbers_of_a_low_rank_map():
    assert zero_map((4, 3)).numbers == lowrank_numbers((4, 3), 0) == 0
    assert LowRank(normal(4, 2), normal(2, 3)).numbers == lowrank_numbers((4, 3), 2) == 14


def test_row_norms_need_no_dense_matrix_where_there_is_a_rule():
    w, up, down, d = normal(4, 3), normal(4, 2), normal(2, 3), normal(3)
    cases = [
        (Dense(w), w),
        (Diagonal(d), torch.diag(d)),
        (Permutation(torch.tensor([1, 0])), torch.eye(2)),
        (LowRank(up, down), up @ down),
        (pivot(LowRank(up, down)), up @ down),
        (Scaled(Dense(w), -3.0), 3 * w),
        (Product((Dense(w), Permutation(torch.tensor([2, 0, 1])))), w[:, [1, 2, 0]]),
        (Dense(w) + LowRank(up, down), w + up @ down),
        (Scaled(Dense(w), 2.0) + LowRank(up, down), 2 * w + up @ down),
    ]
    for map_, matrix in cases:  # no CostWarning, which would be an error here
        assert torch.allclose(row_norms(map_), matrix.norm(dim=1), rtol=1e-10)


def test_row_norms_say_when_they_need_the_dense_matrix():
    map_ = Product((Dense(normal(4, 2)), Dense(normal(2, 3))))
    with pytest.warns(CostWarning, match=r"row norms of Product \(4, 3\) need the dense matrix"):
        found = row_norms(map_)
    assert torch.allclose(found, map_.dense().norm(dim=1))


def test_row_normalized_without_a_rule_states_its_cost():
    map_ = RowNormalized(normal(4), Product((Dense(normal(4, 2)), Dense(normal(2, 3)))))
    with pytest.warns(CostWarning):
        check_map(map_, laws=["cost"])


def test_zero_rows_of_a_direction_stay_zero_and_give_finite_gradients():
    up = normal(3, 2)
    up[1] = 0
    parts = [normal(3).requires_grad_(), up.requires_grad_(), normal(2, 4).requires_grad_()]
    y = RowNormalized(parts[0], LowRank(parts[1], parts[2]))(normal(5, 4))
    assert (y[:, 1] == 0).all()
    y.square().sum().backward()
    for part in parts:
        assert torch.isfinite(part.grad).all()
        assert float(part.grad.abs().max()) > 0


def test_row_normalized_of_a_permutation_keeps_the_dtype():
    map_ = RowNormalized(normal(3).to(torch.bfloat16), Permutation(torch.tensor([2, 0, 1])))
    assert map_(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


W, V = normal(2, 3), normal(4, 2)
REFUSED = {
    "Dense": lambda: Dense(normal(3)),
    "Diagonal": lambda: Diagonal(normal(3, 3)),
    "Permutation of floats": lambda: Permutation(normal(3)),
    "LowRank": lambda: LowRank(normal(3, 2), normal(3, 2)),
    "Pivoted axis": lambda: Pivoted(W, normal(2, 2), torch.arange(4, dtype=torch.int32), "both"),
    "Pivoted order": lambda: Pivoted(W, normal(2, 2), torch.arange(4), "rows"),
    "Pivoted coefficients": lambda: Pivoted(W, normal(3, 2), torch.arange(4, dtype=torch.int32), "rows"),
    "Pivoted beyond its side": lambda: Pivoted(W, normal(0, 2), torch.arange(1, dtype=torch.int32), "rows"),
    "Sparse": lambda: Sparse(normal(3), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 4),
    "NM": lambda: NM(normal(2, 2, 3), torch.zeros(2, 2, 3, dtype=torch.uint8), 2),
    "Bitmap of numbers": lambda: Bitmap(normal(2, 1), normal(2, 1), 4, 1),
    "Bitmap of too few bits": lambda: Bitmap(normal(2, 1), torch.zeros(2, 1, dtype=torch.uint8), 9, 1),
    "Bitmap of too many values": lambda: Bitmap(normal(2, 5), torch.zeros(2, 1, dtype=torch.uint8), 4, 5),
    "Sum of nothing": lambda: Sum(()),
    "Sum": lambda: Dense(W) + Dense(V),
    "Product": lambda: Dense(W) @ Dense(W),
    "Scaled by NaN": lambda: Dense(W) * math.nan,
    "Blocks of nothing": lambda: Blocks(((),)),
    "Blocks": lambda: Blocks(((Dense(W), Dense(V)),)),
    "RowNormalized": lambda: RowNormalized(normal(3), Dense(W)),
    "Masked": lambda: Masked(Dense(W), torch.ones(3, 2, dtype=torch.bool)),
    "Masked by numbers": lambda: Masked(Dense(W), W),
    "map @ tensor": lambda: Dense(W) @ V,
    "input": lambda: Diagonal(normal(3))(normal(4, 1)),
    "longer input": lambda: Permutation(torch.arange(3))(normal(2, 4)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_sentence(what: str):
    with pytest.raises(EckartError) as caught:
        REFUSED[what]()
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 250
    assert "needed" in message or "instead" in message


SPECS = {
    "unknown map 'Mystery'; known are": {"op": "Mystery"},
    "unknown map None": {},
    r"fields \['weight', 'x'\]": {"op": "Dense", "weight": [2, 3], "x": 1},
    r"got fields \[\]": {"op": "Dense"},
    "a shape and a torch dtype": {"op": "Permutation", "order": {"shape": [3], "dtype": "no_such"}},
    "a matrix": {"op": "Dense", "weight": [2, 3, 4]},
}


@pytest.mark.parametrize("message", SPECS)
def test_a_wrong_spec_is_refused_before_anything_is_allocated(message: str):
    with pytest.raises(EckartError, match=message):
        blank(SPECS[message], FAMILIES, torch.float32)


def test_tensors_of_another_kind_are_refused():
    order = {"op": "Permutation", "order": {"shape": [3], "dtype": "int32"}}
    with pytest.raises(EckartError, match=r"dtype torch.int64, needed torch.int32"):
        from_spec(order, {"order": torch.arange(3)}, FAMILIES)
    with pytest.raises(EckartError, match="a floating dtype"):
        from_spec({"op": "Diagonal", "scale": [3]}, {"scale": torch.arange(3)}, FAMILIES)


def test_maps_of_another_dtype_or_kind_are_unequal():
    assert Dense(torch.ones(2, 2)) == Dense(torch.ones(2, 2))
    assert Dense(torch.ones(2, 2)) != Dense(torch.ones(2, 2, dtype=torch.float64))
    assert Dense(torch.ones(2, 2)) != Diagonal(torch.ones(2))
    assert Dense(torch.ones(2, 2)) != "a map"


def test_facts_of_the_families():
    d, p = Diagonal(normal(3)), Permutation(torch.tensor([2, 0, 1]))
    assert facts(d) == {Fact.SYMMETRIC, Fact.DIAGONAL}
    assert facts(p) == facts(-p) == facts(p @ p) == facts(p.T) == {Fact.ORTHOGONAL}
    assert facts(2 * p) == facts(p + p) == facts(p @ d) == facts(Dense(normal(3, 3))) == frozenset()
    assert facts(d @ d) == facts(d + d) == facts(-2.0 * d) == facts(d)
    assert facts(RowNormalized(normal(3), d)) == facts(Masked(d, torch.ones(3, 3, dtype=torch.bool))) == facts(d)


def test_rank_bounds_of_the_composites():
    a, b = LowRank(normal(5, 1), normal(1, 4)), LowRank(normal(5, 2), normal(2, 4))
    assert [rank_bound(m) for m in (a, b, a + b, a + b + b, a @ b.T, b @ a.T, 0 * b)] == [1, 2, 3, 4, 1, 1, 0]
    assert rank_bound(Blocks(((a, b),))) == 3
    assert rank_bound(RowNormalized(normal(5), b)) == 2
    assert rank_bound(Dense(normal(5, 4))) == 4
    assert rank_bound(zero_map((3, 4))) == 0


def _is_dense(map_: LinearMap) -> bool:
    return isinstance(map_, Dense)


@pytest.mark.parametrize(
    ("name", "map_", "simple"),
    [
        ("1 A -> A", Scaled(Dense(W), 1.0), _is_dense),
        ("b (a A) -> (a b) A", 2.0 * (3.0 * Permutation(torch.arange(3))), lambda m: m.scale == 6.0),
        ("a (U V) -> (a U) V", 2.0 * LowRank(V, W), lambda m: isinstance(m, LowRank)),
        ("(A + B) + C", (Dense(W) + Dense(W + 1)) + Dense(W - 1), _is_dense),
        ("W + U V", Dense(normal(4, 3)) + LowRank(V, W), _is_dense),
        ("U V + S T", LowRank(V, W) + LowRank(V + 1, W - 1), lambda m: m.rank == 4),
        ("V W small", Dense(normal(2, 4)) @ Dense(normal(4, 2)), _is_dense),
        ("V W thin stays", Dense(normal(4, 1)) @ Dense(normal(1, 4)), lambda m: isinstance(m, Product)),
        ("diag W", Diagonal(normal(2)) @ Dense(W), _is_dense),
        ("W diag", Dense(W) @ Diagonal(normal(3)), _is_dense),
        ("P W", Permutation(torch.tensor([1, 0])) @ Dense(W), _is_dense),
        ("P Q", Permutation(torch.tensor([1, 2, 0])) @ Permutation(torch.tensor([1, 0, 2])), lambda m: m.numbers == 0),
        ("A (U V)", Diagonal(normal(4)) @ LowRank(V, W), lambda m: isinstance(m, LowRank)),
        ("U V S T", LowRank(V, W) @ LowRank(normal(3, 1), normal(1, 5)), lambda m: m.rank == 1),
        (
            "a b beyond the largest number stays",
            1e200 * (1e200 * Permutation(torch.tensor([1, 0]))),
            lambda m: isinstance(m, Scaled),
        ),
    ],
)
def test_simplify(name: str, map_: LinearMap, simple):
    found = simplify(map_)
    assert simple(found), f"{name}: {found!r}"
    assert torch.allclose(found.dense(), map_.dense(), equal_nan=True)


def test_simplify_keeps_shared_tensors_shared():
    factors = LowRank(V, W)
    found = simplify(2.0 * factors + 3.0 * factors)
    assert found.numbers <= factors.numbers


@linear_map
class Chain(LinearMap):
    """A product of matrices held as a tuple of tensors, with a label and plain numbers: all kinds of fields."""

    factors: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    label: str

    def __post_init__(self) -> None:
        shapes = [tuple(f.shape) for f in self.factors]
        matrices = len(shapes) > 0 and all(len(s) == 2 for s in shapes)
        if not matrices or any(a[1] != b[0] for a, b in pairwise(shapes)):
            raise EckartError(f"Chain: got {shapes}, needed matrices that fit together")

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = torch.nn.functional.linear(x, factor)
        return x

    @property
    def T(self) -> LinearMap:
        return Chain(tuple(f.mT for f in reversed(self.factors)), self.ranks[::-1], self.label)


def test_tuples_of_tensors_and_of_numbers_are_saved():
    map_ = Chain((normal(3, 2), normal(2, 4), normal(4, 2)), (2, 4), "a chain")
    assert list(map_.tensors()) == ["0", "1", "2"]
    assert map_.numbers == 6 + 8 + 8
    # A host holds no tuples of tensors yet.
    pairs = check_map(
        map_, laws=["apply", "transpose", "adjoint", "fields", "save", "moves", "gradient", "cost", "refusals"]
    )
    assert pairs == 9
    assert from_spec(map_.spec(), map_.tensors(), {"Chain": Chain}).ranks == (2, 4)


@pytest.mark.parametrize(
    "damaged",
    [
        Sparse(torch.ones(2), torch.tensor([0, 4]).int(), torch.tensor([0, 1, 2]).int(), 4),
        Sparse(torch.ones(2), torch.tensor([-1, 3]).int(), torch.tensor([0, 1, 2]).int(), 4),
        Sparse(torch.ones(2), torch.tensor([0, 3]).int(), torch.tensor([0, 3, 2]).int(), 4),
        Sparse(torch.ones(2), torch.tensor([0, 3]).int(), torch.tensor([0, 1, 1]).int(), 4),
        NM(torch.ones(2, 1, 1), torch.full((2, 1, 1), 4, dtype=torch.uint8), 4),
        Bitmap(torch.ones(2, 1), torch.tensor([[1], [3]], dtype=torch.uint8), 4, 1),
        Bitmap(torch.ones(2, 1), torch.tensor([[1], [16]], dtype=torch.uint8), 4, 1),
        Permutation(torch.tensor([0, 0, 2])),
        Pivoted(torch.ones(1, 4), torch.ones(2, 1), torch.tensor([0, 3, 2]).int(), "rows"),
    ],
)
def test_validate_refuses_indices_of_no_matrix(damaged):
    with pytest.raises(EckartError):
        damaged.validate()
    with pytest.raises(EckartError):
        (2 * damaged).validate()


@given(st.integers(1, 6), st.integers(1, 20), seeds)
def test_bitmap_keeps_the_largest_of_every_row(m: int, n: int, seed: int):
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    for kept in range(n + 1):
        map_ = bitmap(w, kept)
        map_.validate()
        threshold = w.abs().sort(dim=1, descending=True).values[:, kept - 1 : kept] if kept else torch.full((m, 1), 1e9)
        assert torch.equal(map_.dense(), torch.where(w.abs() >= threshold, w, 0.0))
        assert map_.nbytes == 4 * m * kept + m * -(-n // 8)
    with pytest.raises(EckartError, match=rf"bitmap: got {n + 1} of {n} entries per row"):
        bitmap(w, n + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 0, 7), (2, 3, 7)])
def test_sparse_products_without_gradients_equal_those_with(dtype, shape):
    matrix = torch.randn(5, 7, dtype=dtype) * (torch.rand(5, 7) < 0.4)
    map_, x = sparse(matrix), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(map_(x), x @ matrix.mT)
    learned = x.clone().requires_grad_()
    map_(learned).sum().backward()
    torch.testing.assert_close(learned.grad, matrix.sum(0).expand(shape))


def test_a_vector_of_zeros_reflects_nothing():
    vectors = torch.randn(3, 5, dtype=torch.float64)
    vectors[1] = 0
    assert torch.allclose(Householder(vectors).dense(), Householder(vectors[[0, 2]]).dense())
