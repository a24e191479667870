"""The laws every map passes: each is a function over one `Case` that raises `LawError` with the evidence.

Legend: A the map of a case, W its matrix (m, n); x (..., n) inputs, y (..., m).
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.utils import _pytree as pytree

from eckart.errors import EckartError
from eckart.hosts import host, map_of, offset_of
from eckart.maps import (
    Blocks,
    Dense,
    Diagonal,
    Fact,
    LinearMap,
    Permutation,
    Product,
    Sum,
    blank,
    facts,
    from_spec,
    rank_bound,
    simplify,
    zero_map,
)
from eckart.testing.case import Case, LawError, expect, expect_same, normal
from eckart.testing.counting import count

Law = Callable[[Case], None]

# Every branch on the number of input vectors is on one side of each of these in at least one map.
TOKENS = (1, 2, 3, 8, 9)
# Beyond this many numbers a numerical gradient takes long and tells nothing new.
GRADIENT_NUMBERS = 500


def apply(case: Case) -> None:
    """A(x) = x @ W.T for vectors, batches of any shape, empty batches and strided inputs; x is left alone."""
    expect(case.map.shape == tuple(case.matrix.shape), f"shape is {case.map.shape}, not {tuple(case.matrix.shape)}")
    batches = [case.inputs(*lead) for lead in ((), (1,), (2,), (9,), (2, 3), (0,), (2, 0))]
    batches.append(normal(case.matrix.shape[1], 9).mT)
    for x in batches:
        before = x.clone()
        expect_same(f"A(x) for x {tuple(x.shape)}", case.map(x), x @ case.matrix.mT)
        expect(torch.equal(x, before), "A(x) changed x")


def dense(case: Case) -> None:
    """Written out, A is W, in new memory."""
    found = case.map.dense()
    expect_same("dense()", found, case.matrix)
    held = {t.untyped_storage().data_ptr() for t in case.map.tensors().values() if t.numel()}
    expect(found.untyped_storage().data_ptr() not in held, "dense() shares memory with the map's own tensors")


def transpose(case: Case) -> None:
    """A.T is W.T, and A.T.T is W again."""
    turned = case.map.T
    expect(turned.shape == case.map.shape[::-1], f"the shape of A.T is {turned.shape} beside {case.map.shape}")
    expect_same("A.T.dense()", turned.dense(), case.matrix.mT)
    expect_same("A.T.T.dense()", turned.T.dense(), case.matrix)


def adjoint(case: Case) -> None:
    """<A x, y> = <x, A.T y>, for one vector and for many."""
    m, _ = case.matrix.shape
    for vectors in (1, 9):
        x, y = case.inputs(vectors), normal(vectors, m, seed=1)
        left, right = (case.map(x) * y).sum(-1), (x * case.map.T(y)).sum(-1)
        expect_same(f"<x, A.T y> for {vectors} vectors", right, left)
        expect_same(f"A.T(y) for {vectors} vectors", case.map.T(y), y @ case.matrix)


def algebra(case: Case) -> None:
    """Sums, differences, multiples, products and blocks of A are those of W, applied, written out and transposed."""
    for name, map_, matrix in composites(case):
        expect_same(f"({name}).dense()", map_.dense(), matrix)
        expect_same(f"({name}).T.dense()", map_.T.dense(), matrix.mT)
        for vectors in (1, 9):
            x = normal(vectors, matrix.shape[1])
            expect_same(f"({name})(x) for {vectors} vectors", map_(x), x @ matrix.mT)


def composites(case: Case) -> Iterator[tuple[str, LinearMap, Tensor]]:
    """Yield maps built from A by every operation of the algebra, with their names and matrices."""
    a, w = case.map, case.matrix
    m, n = w.shape
    d, p, q = normal(m, n, seed=2), normal(n, 3, seed=3), normal(2, m, seed=4)
    dense_d, dense_p, dense_q = Dense(d), Dense(p), Dense(q)
    yield "A + A", a + a, 2 * w
    yield "A + D", a + dense_d, w + d
    yield "D + A", dense_d + a, d + w
    yield "A - D", a - dense_d, w - d
    yield "D - A", dense_d - a, d - w
    yield "-A", -a, -w
    yield "A * 2.5", a * 2.5, 2.5 * w
    yield "0 * A", 0 * a, 0 * w
    yield "1 * A", 1 * a, w
    yield "A @ P", a @ dense_p, w @ p
    yield "Q @ A", dense_q @ a, q @ w
    yield "Q @ A @ P", Product((dense_q, a, dense_p)), q @ w @ p
    yield "A @ A.T", a @ a.T, w @ w.mT
    yield "A.T @ A", a.T @ a, w.mT @ w
    yield "(A + D) @ P", (a + dense_d) @ dense_p, (w + d) @ p
    grid = torch.cat((torch.cat((w, d), 1), torch.cat((d, w), 1)))
    yield "[[A, D], [D, A]]", Blocks(((a, dense_d), (dense_d, a))), grid


def claims(case: Case) -> None:
    """Every fact and rank bound claimed of A, -A, 2 A, A + A, A.T, A A.T, A.T A and A A holds on the matrix."""
    a, w = case.map, case.matrix
    built = [("A", a, w), ("-A", -a, -w), ("2 A", 2 * a, 2 * w), ("0 A", 0 * a, 0 * w), ("A + A", a + a, 2 * w)]
    built += [("A.T", a.T, w.mT), ("A A.T", a @ a.T, w @ w.mT), ("A.T A", a.T @ a, w.mT @ w)]
    if w.shape[0] == w.shape[1]:
        built.append(("A A", a @ a, w @ w))
    for name, map_, matrix in built:
        for fact in sorted(facts(map_), key=lambda f: f.name):
            expect(
                holds(fact, matrix),
                f"{name} is claimed {fact.name} ({fact.value}), but its matrix is {matrix.tolist()}",
            )
        rank = int(torch.linalg.matrix_rank(matrix)) if matrix.numel() else 0
        expect(rank <= rank_bound(map_), f"{name} has rank {rank}, above the claimed bound {rank_bound(map_)}")


def holds(fact: Fact, matrix: Tensor) -> bool:
    """Tell whether a matrix (m, n) has a fact, up to rounding."""
    m, n = matrix.shape
    if m != n:
        return False
    pairs = {
        Fact.SYMMETRIC: (matrix, matrix.mT),
        Fact.ORTHOGONAL: (matrix.mT @ matrix, torch.eye(n, dtype=matrix.dtype)),
        Fact.DIAGONAL: (matrix, torch.diag(matrix.diagonal())),
    }
    return torch.allclose(*pairs[fact], rtol=1e-10, atol=1e-10)


def fields(case: Case) -> None:
    """A is its fields: flattened and rebuilt it is equal, another number makes it unequal, and it shows its shape."""
    leaves, tree = pytree.tree_flatten(case.map)
    expect(pytree.tree_unflatten(leaves, tree) == case.map, "flattened and rebuilt, the map differs")
    expect(case.map.apply(torch.clone) == case.map, "a copy with equal numbers is unequal")
    expect({id(t) for t in leaves} == {id(t) for t in case.map.tensors().values()}, "tensors() is not all tensors held")
    m, n = case.map.shape
    expect(f"{m}x{n}" in repr(case.map), f"repr {case.map!r} does not show the shape {m}x{n}")
    if any(t.is_floating_point() and t.numel() for t in leaves):
        moved = case.map.apply(lambda t: t + 1 if t.is_floating_point() else t)
        expect(moved != case.map, "a map with other numbers is equal")


def saved(map_: LinearMap) -> tuple[str, bytes]:
    """Return a map as it is written: its spec as JSON and its tensors as safetensors."""
    tensors = {name: t.detach().contiguous().clone() for name, t in map_.tensors().items()}
    return json.dumps(map_.spec()), safetensors.torch.save(tensors)


def save(case: Case) -> None:
    """Saved and loaded, A is bit-identical; wrong, missing and extra tensors are refused; nothing is copied."""
    for map_ in (case.map, case.map.to(torch.bfloat16)):
        text, data = saved(map_)
        loaded = from_spec(json.loads(text), safetensors.torch.load(data), case.families)
        loaded.validate()
        expect(loaded == map_, f"loaded {loaded!r} is not the {map_!r} that was saved")
        structures = [pytree.tree_structure(m) for m in (loaded, map_)]
        expect(structures[0] == structures[1], f"loaded {loaded!r} has other plain fields than {map_!r}")
        expect(saved(loaded) == (text, data), "saving the loaded map writes other bytes")
    spec, tensors = case.map.spec(), case.map.tensors()
    shared = from_spec(spec, tensors, case.families).tensors()
    expect(all(shared[name] is t for name, t in tensors.items()), "from_spec copied a tensor")
    empty = blank(spec, case.families, torch.float64)
    expect(empty.spec() == spec, f"blank(spec) has the spec {empty.spec()}, not {spec}")
    expect(all(t.is_meta for t in empty.tensors().values()), "blank(spec) allocated memory")
    for name, tensor in tensors.items():
        others = {key: t for key, t in tensors.items() if key != name}
        _expect_refusal(f"loading without tensor {name!r}", from_spec, spec, others, case.families)
        grown = {**others, name: torch.cat((tensor, tensor))}
        if tensor.numel():
            _expect_refusal(f"loading a longer tensor {name!r}", from_spec, spec, grown, case.families)
    extra = {**tensors, "another": normal(1)}
    _expect_refusal("loading with one tensor too many", from_spec, spec, extra, case.families)


def moves(case: Case) -> None:
    """to() casts every number and no index, results follow the dtype, and the meta device holds every shape."""
    x = case.inputs(9)
    size = float((x.abs() @ case.matrix.abs().mT).max()) if case.matrix.numel() else 0.0
    for vectors in (1, 9):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            cast_map = case.map.to(dtype)
            for name, t in case.map.tensors().items():
                wanted = dtype if t.is_floating_point() else t.dtype
                found = cast_map.tensors()[name].dtype
                expect(found == wanted, f"to({dtype}) made tensor {name!r} {found}, not {wanted}")
            y = cast_map(x[:vectors].to(dtype))
            expect(y.dtype == dtype, f"in {dtype}, A(x) for {vectors} vectors is {y.dtype}")
            error = 50 * torch.finfo(dtype).eps * max(size, 1.0)
            expect_same(f"A(x) in {dtype}", y, x[:vectors] @ case.matrix.mT, error)
        meta = case.map.to(device="meta")
        y = meta(x[:vectors].to("meta"))
        expect(
            y.is_meta and y.shape == (vectors, case.matrix.shape[0]), f"on the meta device A(x) is {y.device} {y.shape}"
        )


def gradient(case: Case) -> None:
    """The derivatives by the input and by every number agree with finite differences; that by x is W."""
    leaves, tree = pytree.tree_flatten(case.map)
    places = [i for i, t in enumerate(leaves) if t.is_floating_point()]
    if sum(leaves[i].numel() for i in places) > GRADIENT_NUMBERS:
        return

    def rebuilt(x: Tensor, *numbers: Tensor) -> Tensor:
        now = list(leaves)
        for i, t in zip(places, numbers, strict=True):
            now[i] = t
        return cast(Tensor, pytree.tree_unflatten(now, tree)(x))

    numbers = [leaves[i].detach().clone().requires_grad_() for i in places]
    for vectors in (1, 9):
        x = case.inputs(vectors).requires_grad_()
        try:
            gradcheck(rebuilt, (x, *numbers), fast_mode=True)
        except GradcheckError as error:
            raise LawError(f"gradcheck for {vectors} vectors: {error}") from error
    expect_same("jacobian", torch.func.jacrev(case.map)(case.inputs()), case.matrix)


def hosted(case: Case) -> None:
    """map_of(host(A)) = A with shared tensors, bias or not; the module computes A(x) + b and follows its parameters."""
    m, _ = case.map.shape
    for bias in (None, normal(m, seed=5)):
        map_ = case.map.apply(torch.clone)
        module = host(map_, bias).eval()
        back, offset = map_of(module), offset_of(module)
        expect(type(back) is type(map_) and back == map_, f"map_of(host(A)) is {back!r}, not {map_!r}")
        for name, t in map_.tensors().items():
            expect(back.tensors()[name].data_ptr() == t.data_ptr(), f"the host holds a copy of tensor {name!r}")
        same_bias = offset is None if bias is None else offset is not None and offset.data_ptr() == bias.data_ptr()
        expect(same_bias, f"the bias {bias} came back as {offset}")
        _expect_module(case, module, case.matrix, 0.0 if bias is None else bias)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)
        _expect_module(case, module, map_.dense().double(), 0.0 if bias is None else cast(Tensor, offset))
        trained = sum(p.numel() for p in module.parameters()) - (0 if bias is None else m)
        held = sum(t.numel() for t in _held(map_) if t.is_floating_point())
        expect(trained == held, f"the host trains {trained} numbers, the map holds {held}")


def _expect_module(case: Case, module: nn.Module, matrix: Tensor, bias: Tensor | float) -> None:
    """Check a host against W and b, with gradients and without, twice since the second token may take a short cut."""
    with torch.no_grad():
        for lead in ((9,), (1,), (1,), (2, 3), (1, 1)):
            x = case.inputs(*lead)
            expect_same(f"host(A)(x) for x {tuple(x.shape)}", module(x), x @ matrix.mT + bias)
    x = case.inputs(2)
    expect_same("host(A)(x) with gradients", module(x), x @ matrix.mT + bias)


def compiled(case: Case) -> None:
    """torch.compile in one graph agrees with eager, the map captured from outside or passed as an argument."""
    for vectors in (1, 9):
        torch._dynamo.reset()
        x = case.inputs(vectors)
        captured = torch.compile(partial(_applied, case.map), fullgraph=True, backend="eager")
        expect_same(f"A(x) compiled, {vectors} vectors", captured(x), x @ case.matrix.mT)
        passed = torch.compile(_applied, fullgraph=True, backend="eager")
        expect_same(f"A(x) compiled with A an argument, {vectors} vectors", passed(case.map, x), x @ case.matrix.mT)


def _applied(map_: LinearMap, x: Tensor) -> Tensor:
    return map_(x)


def exported(case: Case) -> None:
    """The host survives torch.export and computes the same."""
    for vectors in (1, 9):
        x = case.inputs(vectors)
        program = torch.export.export(host(case.map), (x,)).module()
        expect_same(f"A(x) exported, {vectors} vectors", program(x), x @ case.matrix.mT)


def vmapped(case: Case) -> None:
    """torch.func.vmap over a batch agrees with applying to it, over the first axis or another."""
    for vectors in (1, 9):
        x = case.inputs(4, vectors)
        expect_same("vmap(A)(x)", torch.func.vmap(case.map)(x), x @ case.matrix.mT)
        expect_same("vmap(A, in_dims=1)(x)", torch.func.vmap(case.map, in_dims=1, out_dims=1)(x), x @ case.matrix.mT)


def cost(case: Case) -> None:
    """Stated numbers, bytes and operations are those counted."""
    held = _held(case.map)
    numbers = sum(t.numel() for t in held if t.is_floating_point()) if case.numbers is None else case.numbers
    nbytes = sum(t.numel() * t.element_size() for t in held)
    expect(case.map.numbers == numbers, f"numbers is {case.map.numbers}, but the map holds {numbers}")
    expect(case.map.nbytes == nbytes, f"nbytes is {case.map.nbytes}, but the map holds {nbytes}")
    for tokens in TOKENS:
        counted, stated = count(partial(case.map, case.inputs(tokens))), case.map.flops(tokens)
        expect(counted == stated, f"flops({tokens}) is {stated}, but {counted} operations were made")
    counted, stated = count(case.map.dense), case.map.dense_flops()
    expect(counted == stated, f"dense_flops() is {stated}, but {counted} operations were made")


def _held(map_: LinearMap) -> list[Tensor]:
    """Return the tensors of a map, each once."""
    return list({id(t): t for t in pytree.tree_leaves(map_)}.values())


def simplified(case: Case) -> None:
    """simplify() keeps the value of A and of what is built from it, and raises no cost: numbers, bytes, operations."""
    a, w = case.map, case.matrix
    m, n = w.shape
    scale, order = normal(m, seed=6), torch.arange(n - 1, -1, -1)
    more: list[tuple[str, LinearMap, Tensor]] = [
        ("A", a, w),
        ("2 (3 A)", 2.0 * (3.0 * a), 6 * w),
        ("2 A + 3 A", 2.0 * a + 3.0 * a, 5 * w),
        ("(A + A) + A", (a + a) + a, 3 * w),
        ("[[A]] @ A.T", Product((Blocks(((a,),)), a.T)), w @ w.mT),
        ("sum of one", Sum((Product((a,)),)), w),
        ("diag A", Diagonal(scale) @ a, scale[:, None] * w),
        ("A P", a @ Permutation(order), w[:, order.argsort()]),
        ("A (2 A.T)", Product((a, 2.0 * a.T)), 2 * w @ w.mT),
        ("tall (2 A)", Product((Dense(normal(20 * m, m)), 2.0 * a)), 2 * normal(20 * m, m) @ w),
    ]
    for name, map_, matrix in (*more, *composites(case)):
        short = simplify(map_)
        expect_same(f"simplify({name}).dense()", short.dense(), matrix)
        x = normal(9, matrix.shape[1])
        expect_same(f"simplify({name})(x)", short(x), x @ matrix.mT)
        before, after = costs(map_), costs(short)
        dearer = {kind: (before[kind], after[kind]) for kind in before if after[kind] > before[kind]}
        expect(not dearer, f"simplify({name}) = {short!r} costs more: {dearer} (before, after)")


def costs(map_: LinearMap) -> dict[str, int]:
    """Return what a map costs: numbers, bytes, and operations for one and for many input vectors."""
    flops = {f"flops({tokens})": map_.flops(tokens) for tokens in (*TOKENS, 64, 5000)}
    return {"numbers": map_.numbers, "bytes": map_.nbytes, **flops}


def refusals(case: Case) -> None:
    """Inputs of another width are refused; a part of another shape is refused or makes a map that works.

    A refusal is an `EckartError`; an error from inside torch, or a silent broadcast, is not.
    """
    _, n = case.map.shape
    for lead in ((), (1,), (9,)):
        for width in {n + 1, n + 7, max(n - 1, 0), 1} - {n}:
            _expect_refusal(f"an input of shape {(*lead, width)}", case.map, normal(*lead, width))
    _expect_refusal("an input without axes", case.map, normal())
    for field in dataclasses.fields(cast(Any, case.map)):
        value = getattr(case.map, field.name)
        for other in _other_parts(value):
            _expect_refusal_or_map(case.map, field.name, other)


def _other_parts(value: Any) -> Iterator[Any]:
    """Yield tensors and maps of other shapes in place of a tensor, a map, or those in a tuple."""
    if isinstance(value, Tensor):
        yield value[None]
        yield value.flatten()[:1].reshape(()) if value.numel() else value.new_zeros(())
        # Not the length of an index tensor: a shorter permutation has the shape of a permutation, but is none.
        for axis in range(value.ndim if value.is_floating_point() else 0):
            yield torch.cat((value, value.narrow(axis, 0, min(1, value.shape[axis]))), axis)
            yield value.narrow(axis, 0, max(value.shape[axis] - 1, 0))
    elif isinstance(value, LinearMap):
        m, n = value.shape
        yield zero_map((m + 1, n), torch.float64)
        yield zero_map((m, n + 1), torch.float64)
    elif isinstance(value, tuple):
        yield ()
        for i, item in enumerate(value):
            for other in _other_parts(item):
                yield (*value[:i], other, *value[i + 1 :])


def _expect_refusal_or_map(map_: LinearMap, name: str, other: Any) -> None:
    what = f"field {name!r} replaced by {other if isinstance(other, (LinearMap, tuple)) else tuple(other.shape)}"
    try:
        made = dataclasses.replace(cast(Any, map_), **{name: other})
    except EckartError:
        return
    m, n = made.shape
    expect(made.dense().shape == (m, n), f"{what} made a map of shape {(m, n)} and matrix {tuple(made.dense().shape)}")
    for vectors in (1, 9):
        x = normal(vectors, n)
        expect_same(f"{what}: A(x)", made(x), x @ made.dense().mT.double())


def _expect_refusal(what: str, function: Callable[..., object], *args: object) -> None:
    try:
        function(*args)
    except EckartError:
        return
    expect(False, f"{what} was accepted; it must be refused with an EckartError")


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        apply, dense, transpose, adjoint, algebra, claims, fields, save, moves, gradient,
        hosted, compiled, exported, vmapped, cost, simplified, refusals,
    )
}  # fmt: skip
# Tracing takes seconds rather than milliseconds.
TRACED = ("compiled", "exported")
