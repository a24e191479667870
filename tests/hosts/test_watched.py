"""A temporary dense weight is never used after a change, by whatever way torch and the tools around it make it."""

import copy
import gc
import io
import weakref
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters

from eckart.hosts import TiedHead, embedding_host, host
from eckart.hosts.watched import WatchedDict, WatchedOrderedDict, Watcher, watch
from eckart.maps import Bitmap, Dense, Interleaved, LinearMap, LowRank, Pivoted, Product, Sum, pivot

M, N, K = 12, 16, 3


def lowrank() -> LowRank:
    return LowRank(torch.randn(M, K), torch.randn(K, N))


def sparse() -> Bitmap:
    bits = torch.tensor([[0b0111], [0b1011], [0b1101]], dtype=torch.uint8).repeat(4, 1)
    return Bitmap(torch.randn(M, 3), bits, 4, 3)


MAPS: dict[str, Callable[[], LinearMap]] = {
    "lowrank": lowrank,
    "pivoted": lambda: pivot(lowrank(), "rows"),
    "sum": lambda: Sum((lowrank(), Product((sparse(), Dense(torch.randn(4, N)))))),
}


def leaf_of(module: nn.Module) -> nn.Linear:
    """The last leaf: in the sum, of a host inside a host inside the host."""
    return [part for part in module.modules() if isinstance(part, nn.Linear)][-1]


@pytest.fixture(params=list(MAPS))
def module(request):
    torch.manual_seed(1)
    return host(MAPS[request.param](), torch.randn(M)).eval()


@torch.no_grad()
def follows(module: nn.Module, tokens: int = 1) -> torch.Tensor:
    """Check that a call gives what the structure gives, and return that for the same input every time."""
    x = torch.linspace(-1, 1, tokens * N).view(tokens, N)
    y = module(x)
    torch.testing.assert_close(y, module.structured(x), atol=1e-4, rtol=1e-4)
    return y


def changes(module: nn.Module, change: Callable[[nn.Module, nn.Linear], object], tokens: int = 1) -> bool:
    """Make a change between two calls, and tell whether the result is another, as the structure's is."""
    before = follows(module, tokens)
    assert module._decoding is not None
    change(module, leaf_of(module))
    return not torch.allclose(before, follows(module, tokens), atol=1e-3)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Adding(ModelHook):
    def post_forward(self, module, output):
        return output + 1


def double(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(2 * weight.detach())


def doubled_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: 2 * t if t.is_floating_point() else t for name, t in module.state_dict().items()}


@torch.no_grad()
def scale_in_place(module, leaf):
    leaf.weight.mul_(2)


def write_vector(module, leaf):
    vector_to_parameters(2 * parameters_to_vector(module.parameters()).detach(), module.parameters())


def set_forward(module, leaf):
    forward = leaf.forward
    leaf.forward = lambda x: forward(x) + 1


def wrap(module, leaf):
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if part is leaf:
                setattr(parent, name, nn.Sequential(leaf, nn.Tanh()))


CHANGES: dict[str, Callable[[nn.Module, nn.Linear], object]] = {
    "in place": scale_in_place,
    "set": lambda module, leaf: setattr(leaf, "weight", double(leaf.weight)),
    "set as data": lambda module, leaf: setattr(leaf.weight, "data", 2 * leaf.weight.data),
    "set in the dictionary": lambda module, leaf: leaf._parameters.__setitem__("weight", double(leaf.weight)),
    "updated in the dictionary": lambda module, leaf: leaf._parameters.update(weight=double(leaf.weight)),
    "vector_to_parameters": write_vector,
    "load": lambda module, _: module.load_state_dict(doubled_state(module)),
    "load and assign": lambda module, _: module.load_state_dict(doubled_state(module), assign=True),
    "swap": lambda module, leaf: torch.utils.swap_tensors(leaf.weight, double(leaf.weight)),
    "double": lambda module, leaf: module._apply(lambda t: t * 2 if t.is_floating_point() else t),
    "parametrize": lambda module, leaf: parametrize.register_parametrization(leaf, "weight", Doubled()),
    "prune": lambda module, leaf: prune.l1_unstructured(leaf, "weight", amount=0.5),
    "accelerate sets": lambda module, leaf: set_module_tensor_to_device(leaf, "weight", "cpu", double(leaf.weight)),
    "accelerate hooks": lambda module, leaf: add_hook_to_module(leaf, Adding()),
    "hook": lambda module, leaf: leaf.register_forward_hook(lambda _, __, output: output + 1),
    "hook before": lambda module, leaf: leaf.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    "forward": set_forward,
    "wrapped": wrap,
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHANGES))
def test_any_change_of_a_factor_shows_in_the_next_token(module, name):
    assert changes(module, CHANGES[name])


def test_a_change_of_a_factor_set_after_the_first_token_shows_too(module):
    def replace(module, leaf):
        name = next(name for name, part in module.named_modules() if part is leaf)
        other = nn.Linear(leaf.in_features, leaf.out_features, bias=leaf.bias is not None)
        module.set_submodule(name, other)

    assert changes(module, replace)
    for name in ("set", "in place", "set as data", "hook"):
        assert changes(module, CHANGES[name]), name


def test_a_change_of_a_host_inside_shows_in_the_next_token():
    def inner(module: nn.Module) -> nn.Module:
        return module.get_submodule("0")

    for change in (
        lambda m, _: setattr(m, "0", host(lowrank())),
        lambda m, _: inner(m).register_forward_hook(lambda _, __, output: output + 1),
        lambda m, _: inner(m).register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
        lambda m, _: setattr(inner(m), "forward", lambda x: torch.ones(M)),
        lambda m, _: setattr(inner(m).up, "bias", nn.Parameter(torch.ones(M))),
        lambda m, _: setattr(m.get_submodule("1"), "bias", nn.Parameter(torch.ones(M))),
        lambda m, _: setattr(m.get_submodule("1.0"), "bits", m.get_submodule("1.0").bits.flip(0)),
        lambda m, _: m.get_submodule("1.0").bits.copy_(m.get_submodule("1.0").bits.flip(0)),
        lambda m, _: vector_to_parameters(torch.ones(36), [m.get_submodule("1.0").values]),
    ):
        assert changes(host(MAPS["sum"]()).eval(), change)


def test_a_new_bias_counts(module):
    assert changes(module, lambda m, _: setattr(m.bias_owner, "bias", nn.Parameter(torch.ones(M))))
    assert changes(module, lambda m, _: setattr(m.bias_owner, "bias", None))


def test_a_bias_of_a_factor_counts():
    module = host(lowrank()).eval()
    assert changes(module, lambda m, _: setattr(m.down, "bias", nn.Parameter(torch.ones(K))))


def test_a_buffer_counts():
    module = host(pivot(lowrank(), "rows")).eval()
    assert changes(module, lambda m, _: m.order.copy_(m.order.flip(0)))
    assert changes(module, lambda m, _: setattr(m, "order", m.order.flip(0)))
    assert changes(module, lambda m, _: m._buffers.update(order=m.order.flip(0)))
    several = host(Interleaved((lowrank(), lowrank()), (torch.arange(2 * M) % 2).to(torch.uint8))).eval()
    assert changes(several, lambda m, _: m.which.copy_(torch.arange(2 * M) // M))


def test_a_forward_around_that_of_the_host_is_called_every_time(module):
    follows(module)
    called, forward = [], module.forward
    module.forward = lambda x: called.append(1) or forward(x)
    for _ in range(3):
        follows(module)
    assert len(called) == 3
    del module.forward
    follows(module)
    assert len(called) == 3


def test_what_is_set_past_torch_shows_with_the_next_prompt(module):
    forward = leaf_of(module).forward
    assert changes(module, lambda _, leaf: leaf.__dict__.update(forward=lambda x: forward(x) + 1), tokens=2)
    module.eval()
    assert module._decoding is None
    follows(module)


def test_other_factors_for_one_call(module):
    others = {name: 2 * tensor.detach() for name, tensor in module.named_parameters()}
    x = torch.randn(1, N)
    for kind in (nn.Parameter, torch.Tensor.clone):
        before = follows(module)
        with torch.no_grad():
            given = {name: kind(tensor) for name, tensor in others.items()}
            twice = torch.func.functional_call(module, given, (x,))
        torch.testing.assert_close(follows(module), before)
        with torch.no_grad():
            for name, tensor in module.named_parameters():
                tensor.copy_(others[name])
            torch.testing.assert_close(module(x), twice, atol=1e-4, rtol=1e-4)
            for tensor in module.parameters():
                tensor.div_(2)


def test_hosts_stacked_for_vmap(module):
    other = copy.deepcopy(module)
    with torch.no_grad():
        leaf_of(other).weight.mul_(2)
    x = torch.randn(1, N)
    parameters, buffers = torch.func.stack_module_state([module, other])
    with torch.no_grad():
        expected = torch.stack((module(x), other(x)))
        both = torch.vmap(lambda p, b: torch.func.functional_call(module, (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)
    follows(module)


@torch.no_grad()
def test_parameters_of_a_host_without_leaves_stacked_for_vmap():
    module, x = host(sparse()).eval(), torch.randn(1, 4)
    expected = module(x)
    assert module._decoding is not None
    values = torch.stack((module.values, 2 * module.values))
    both = torch.vmap(lambda v: torch.func.functional_call(module, {"values": v}, (x,)))(values)
    torch.testing.assert_close(both, torch.stack((expected, 2 * expected)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x), expected)


def test_buffers_stacked_for_vmap():
    module = host(pivot(lowrank(), "rows")).eval()
    follows(module)
    x, orders = torch.randn(1, N), torch.stack((module.order, module.order.flip(0)))
    with torch.no_grad():
        both = torch.vmap(lambda order: torch.func.functional_call(module, {"order": order}, (x,)))(orders)
        torch.testing.assert_close(both[0], module(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            both[1], module(x)[:, module.order.argsort()][:, module.order.flip(0)], atol=1e-5, rtol=1e-5
        )
    follows(module)


def test_forward_derivatives(module):
    follows(module)
    x, v = torch.randn(1, N), torch.randn(1, N)
    for _ in range(2):
        with torch.no_grad():
            _, derivative = torch.func.jvp(module, (x,), (v,))
            torch.testing.assert_close(derivative, module(v) - module.offset, atol=1e-5, rtol=1e-5)
        module.eval()
    follows(module)


def test_made_in_inference_mode_and_used_outside(module):
    with torch.inference_mode():
        assert module(torch.ones(1, N)).is_inference()
    made = module._decoding
    assert made is not None
    assert not made.weight.is_inference()
    assert changes(module, scale_in_place)
    with torch.inference_mode():
        torch.testing.assert_close(module(torch.ones(1, N)), module.structured(torch.ones(1, N)), atol=1e-4, rtol=1e-4)


def test_copies_are_plain_and_change_alone(module):
    follows(module)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(module), loaded):
        parts = [store for part in other.modules() for store in vars(part).values() if isinstance(store, dict)]
        assert {type(store) for store in parts} <= {dict, OrderedDict}
        before = follows(module)
        assert changes(other, CHANGES["set"])
        assert changes(other, CHANGES["hook"])
        torch.testing.assert_close(follows(module), before, rtol=0, atol=0)
        changed = follows(other)
        assert changes(module, CHANGES["set"])
        torch.testing.assert_close(follows(other), changed, rtol=0, atol=0)
    shallow = copy.copy(module)  # shares the dictionaries
    follows(shallow)
    assert changes(module, CHANGES["set"])
    torch.testing.assert_close(follows(shallow), follows(module), rtol=0, atol=0)


def test_a_factor_in_two_hosts_is_watched_for_both():
    first, second = host(lowrank()).eval(), host(lowrank()).eval()
    second.down = first.down
    for name in ("set", "hook", "in place"):
        before = follows(first), follows(second)
        CHANGES[name](first, first.down)
        for module, old in zip((first, second), before, strict=True):
            assert not torch.allclose(follows(module), old, atol=1e-3)


def test_kept_where_nothing_changes(module):
    follows(module)
    made = module._decoding
    leaf = leaf_of(module)
    assert not hasattr(leaf, "absent")
    handle = leaf.register_forward_hook(lambda *_: None)
    handle.remove()
    follows(module)
    assert module._decoding is not made  # a hook did come and go
    made = module._decoding
    assert leaf.weight is leaf._parameters["weight"]
    list(module.named_parameters())
    module.state_dict()
    copy.deepcopy(module)
    follows(module)
    assert module._decoding is made


def test_a_single_token_skips_what_torch_does_around_forward(module, monkeypatch):
    follows(module)

    def refuse(self, x):
        raise AssertionError("the temporary dense weight was not used at once")

    monkeypatch.setattr(type(module), "forward", refuse)
    with torch.no_grad():
        assert module(torch.randn(1, 1, N)).shape == (1, 1, M)
        assert module(torch.randn(3, 1, N)).shape == (3, 1, M)


def test_hooks_from_before_the_first_token_can_be_removed(module):
    called = []
    handles = [part.register_forward_hook(lambda *_: called.append(1)) for part in (module, leaf_of(module))]
    follows(module)
    assert called
    for handle in handles:
        handle.remove()
    called.clear()
    follows(module)
    follows(module)
    assert not called
    assert not module._forward_hooks
    assert module._decoding is not None


def test_watchers_do_not_accumulate(module):
    for _ in range(5):
        follows(module)
        module.eval()
    follows(module)
    assert len(leaf_of(module)._parameters.watchers) <= 2


@pytest.mark.parametrize("kind", list(MAPS))
def test_freed_at_once(kind):
    table = embedding_host(Pivoted(torch.randn(30, 4), torch.randn(4, 6), torch.randperm(10).int(), "columns"))
    model = nn.ModuleDict({"layer": host(MAPS[kind](), torch.randn(M)), "table": table, "head": TiedHead(table)}).eval()
    for _ in range(2):
        follows(model["layer"])
        with torch.no_grad():
            model["head"](model["table"](torch.tensor([1])))
            leaf_of(model["layer"]).weight = double(leaf_of(model["layer"]).weight)
            table.rest.weight = double(table.rest.weight)
    follows(model["layer"])
    weights = model["layer"]._decoding.weight, table.temporary_dense()
    held = [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers(), *weights)]
    gc.collect()
    gc.disable()
    try:
        del model, table, weights
        assert all(reference() is None for reference in held)
    finally:
        gc.enable()


@torch.no_grad()
def test_a_table_and_its_tied_head_see_every_change():
    ids, hidden = torch.tensor([3, 1, 7]), torch.randn(2, 10)
    for name in ("set", "in place", "set as data", "vector_to_parameters", "hook", "forward", "accelerate hooks"):
        table = embedding_host(pivot(LowRank(torch.randn(23, 4), torch.randn(4, 10)), "columns"))
        head = TiedHead(table)
        for part in (table.rest, table.table):
            rows, logits = table(ids), head(hidden)
            assert table._decoding is not None
            CHANGES[name](table, part) if name != "forward" else setattr(
                part, "forward", lambda x, f=part.forward: f(x) + 1
            )
            if name in ("hook", "forward", "accelerate hooks"):
                assert not torch.allclose(table(ids), rows)
                break
            expected = table.held_map().dense()
            torch.testing.assert_close(table(ids), expected[ids], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(head(hidden), hidden @ expected.T, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(head(hidden), logits)
            assert table._decoding is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_and_exported_after_a_first_token(module, backend):
    torch.compiler.reset()
    follows(module)
    x, leaf = torch.randn(1, N), leaf_of(module)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for name in ("set", "in place", "set as data"):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module.structured(x), atol=1e-4, rtol=1e-4)
        compiled(x).sum().backward()
        assert changes(module, CHANGES[name])
        leaf.weight.grad = None
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module.structured(x), atol=1e-3, rtol=1e-4)
        for strict in (False, True):
            exported = torch.export.export(module, (x,), strict=strict).module()
            torch.testing.assert_close(exported(x), module.structured(x), atol=1e-3, rtol=1e-4)
    assert changes(module, CHANGES["set"])


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_every_change_of_a_dictionary_is_reported(kind):
    part = nn.Linear(1, 1)
    part._parameters = kind(a=1, b=2)

    def reports(action: Callable[[dict], object]) -> bool:
        watcher = Watcher()
        watch(part, ("_parameters",), watcher)
        action(part._parameters)
        return not watcher.holds

    assert not reports(
        lambda d: (d["a"], d.get("c"), "a" in d, "c" in d, list(d.items()), len(d), d.copy(), d | {"c": 1}, d == {})
    )
    assert isinstance(part._parameters, WatchedDict if kind is dict else WatchedOrderedDict)
    for action in (
        lambda d: d.__setitem__("c", 3),
        lambda d: d.__delitem__("c"),
        lambda d: d.__ior__({"c": 4}),
        lambda d: d.pop("c"),
        lambda d: d.setdefault("c", 5),
        lambda d: d.update({"a": 6}),
        lambda d: d.update(b=7),
        lambda d: d.popitem(),
        lambda d: d.clear(),
    ):
        assert reports(action)
    part._parameters["a"] = 1

    def fails_halfway():
        yield "a", 2
        raise ValueError("halfway")

    def update(d):
        with pytest.raises(ValueError, match="halfway"):
            d.update(fails_halfway())

    assert reports(update)
    assert part._parameters == {"a": 2}
    assert type(part._parameters.copy()) in (dict, WatchedOrderedDict)
    assert type(copy.deepcopy(part._parameters)) is kind
