"""`host` and `map_of` are inverses, share tensors, and compute what the map says."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from eckart.errors import EckartError
from eckart.hosts import Host, host, map_of, offset_of
from eckart.hosts.decoding import NUMBERS_PER_CALL
from eckart.maps import (
    NM,
    Bitmap,
    Blocks,
    Dense,
    Diagonal,
    LowRank,
    Masked,
    Permutation,
    Pivoted,
    Placement,
    Product,
    RowNormalized,
    Scaled,
    Selection,
    Sparse,
    Sum,
    bitmap,
    n_of_m,
    pivot,
    sparse,
)

M, N, K = 12, 16, 3


def lowrank(m: int = M, n: int = N, k: int = K) -> LowRank:
    return LowRank(torch.randn(m, k), torch.randn(k, n))


def maps() -> dict[str, object]:
    torch.manual_seed(0)
    weight = torch.randn(M, N)
    return {
        "dense": Dense(weight),
        "lowrank": lowrank(),
        "lowrank-zero": lowrank(k=0),
        "pivoted-rows": pivot(lowrank(), "rows"),
        "pivoted-columns": pivot(lowrank(), "columns"),
        "diagonal": Diagonal(torch.randn(M)),
        "permutation": Permutation(torch.randperm(M).to(torch.int32)),
        "selection": Selection(torch.tensor([0, 2, 3], dtype=torch.int32), N),
        "placement": Placement(torch.tensor([0, 2, 3], dtype=torch.int32), M),
        "sparse": sparse(weight * (torch.rand(M, N) > 0.7)),
        "2:4": n_of_m(weight, 2, 4),
        "bitmap": bitmap(weight, 5),
        "masked": Masked(Dense(weight), torch.rand(M, N) > 0.5),
        "normalized": RowNormalized(torch.rand(M), Dense(weight)),
        "sum": Sum((Dense(weight), lowrank())),
        "product": Product((Dense(torch.randn(M, M)), pivot(lowrank()))),
        "scaled": Scaled(lowrank(), -0.5),
        "blocks": Blocks(
            ((lowrank(4, 6, 2), Dense(torch.randn(4, 10))), (Dense(torch.randn(8, 6)), lowrank(8, 10, 2)))
        ),
        "nested": Sum((Product((Diagonal(torch.randn(M)), lowrank())), Scaled(Sum((Dense(weight), lowrank())), 2.0))),
    }


@pytest.fixture(params=list(maps()))
def map_(request):
    return maps()[request.param]


def pointers(tensors) -> set[int]:
    return {t.data_ptr() for t in tensors if t.numel()}


def test_round_trip_shares_every_tensor(map_):
    bias = torch.randn(map_.shape[0])
    module = host(map_, bias)
    held = map_of(module)
    assert held == map_
    assert pointers(held.tensors().values()) == pointers(map_.tensors().values())
    assert offset_of(module).data_ptr() == bias.data_ptr()
    stored = {*module.parameters(), *module.buffers()}
    assert pointers(stored) == pointers([*map_.tensors().values(), bias])
    assert offset_of(host(map_)) is None


@pytest.mark.parametrize("shape", [(N,), (1, N), (5, N), (2, 1, N), (2, 7, N), (0, N)])
def test_a_host_computes_what_its_map_says(map_, shape):
    n = map_.shape[1]
    x, bias = torch.randn(*shape[:-1], n), torch.randn(map_.shape[0])
    for offset in (bias, None):
        module = host(map_, offset)
        expected = nn.functional.linear(x, map_.dense(), offset)
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(map_):
    module = host(map_, torch.zeros(map_.shape[0]))
    (module(torch.randn(4, map_.shape[1])) * torch.rand(4, map_.shape[0])).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.numel() == 0 or parameter.grad.abs().sum() > 0, name


def test_state_dict_round_trip(map_):
    module = host(map_, torch.randn(map_.shape[0]))
    blank = (
        host(map_.apply(torch.zeros_like), torch.zeros(map_.shape[0]))
        if not isinstance(
            map_, (Pivoted, Permutation, Selection, Placement, Sparse, NM, Bitmap, Masked, RowNormalized, Product)
        )
        else host(map_.apply(torch.clone), torch.zeros(map_.shape[0]))
    )  # index tensors of zeros are no such map
    blank.load_state_dict(module.state_dict())
    assert map_of(blank) == map_
    assert torch.equal(offset_of(blank), offset_of(module))


def test_moves_and_copies_keep_the_map(map_):
    module = host(map_, torch.randn(map_.shape[0]))
    assert map_of(copy.deepcopy(module)) == map_
    assert map_of(copy.deepcopy(module).double()) == map_.to(torch.float64)


def test_compiled_without_breaks(map_):
    torch.compiler.reset()
    module = host(map_, torch.randn(map_.shape[0]))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for tokens in (1, 9):
        x = torch.randn(tokens, map_.shape[1])
        torch.testing.assert_close(compiled(x), module(x), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), atol=1e-5, rtol=1e-5)


def test_factors_are_plain_linear_layers():
    module = host(lowrank(), torch.zeros(M))
    assert [name for name, _ in module.named_parameters()] == ["down.weight", "up.weight", "up.bias"]
    assert type(module.up) is type(module.down) is nn.Linear
    assert isinstance(module, Host)
    assert not isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (N, M)
    assert f"numbers={K * (M + N) + M}" in repr(module)
    pivoted = host(pivot(lowrank()))
    assert list(pivoted.state_dict()) == ["order", "basis.weight", "coefficients.weight"]


def test_wrapped_factors_are_used_as_they_are():
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features

        def forward(self, x):
            return 2 * self.inner(x)

    for axis in ("rows", "columns"):
        map_ = pivot(lowrank(), axis)
        module = host(map_)
        module.coefficients = Doubled(module.coefficients)
        x = torch.randn(1, N)
        expected = Pivoted(map_.basis, 2 * map_.coefficients, map_.order, axis)(x)
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    module = host(lowrank())
    module.up = Doubled(module.up)
    with torch.no_grad(), pytest.raises(AttributeError):
        map_of(module)


def test_wrong_bias_and_unknown_modules_are_refused():
    with pytest.raises(EckartError, match="host bias"):
        host(lowrank(), torch.zeros(M + 1))
    with pytest.raises(EckartError, match="no map is held by a ReLU"):
        map_of(nn.ReLU())


# The temporary dense weight of decoding. It must be used exactly for single tokens without gradients on CPU, and never
# outlive a change of the factors.


def hosts() -> dict[str, nn.Module]:
    return {
        "lowrank": host(lowrank(), torch.randn(M)).eval(),
        "pivoted-rows": host(pivot(lowrank(), "rows"), torch.randn(M)).eval(),
        "pivoted-columns": host(pivot(lowrank(), "columns"), torch.randn(M)).eval(),
    }


@pytest.fixture(params=list(hosts()))
def module(request):
    torch.manual_seed(1)
    return hosts()[request.param]


def leaves(module: nn.Module) -> list[nn.Linear]:
    return [child for child in module.children() if isinstance(child, nn.Linear)]


@torch.no_grad()
def expected_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, map_of(module).dense(), offset_of(module))


def decode(module: nn.Module) -> None:
    with torch.no_grad():
        x = torch.randn(2, 1, N)
        torch.testing.assert_close(module(x), expected_of(module, x), atol=1e-5, rtol=1e-5)


def test_made_at_the_first_single_token(module):
    assert module._decoding is None
    decode(module)
    made = module._decoding.weight
    assert made.shape == (M, N)
    assert not made.requires_grad
    decode(module)
    assert module._decoding.weight is made
    assert all("_decoding" not in name for name in module.state_dict())


def test_not_with_gradients(module):
    module(torch.randn(1, N))
    assert module._decoding is None


def test_not_under_compile(module):
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(module, backend="eager")(torch.randn(1, N))
    assert module._decoding is None


def test_not_where_dense_costs_more():
    side = int(NUMBERS_PER_CALL**0.5) * 2
    for map_ in (lowrank(side, side, 4), pivot(lowrank(2 * side, 2 * side, 4))):
        module = host(map_).eval()
        with torch.no_grad():
            module(torch.randn(1, map_.shape[1]))
        assert module._decoding is None


def test_kept_for_longer_inputs(module):
    decode(module)
    made, x = module._decoding.weight, torch.randn(2, 7, N)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected_of(module, x), atol=1e-5, rtol=1e-5)
    assert module._decoding.weight is made


def test_forgotten_with_gradients(module):
    decode(module)
    module(torch.randn(1, N))
    assert module._decoding is None


@pytest.mark.parametrize("mode", [True, False])
def test_forgotten_with_a_change_of_mode(module, mode):
    decode(module)
    module.train(mode)
    assert module._decoding is None


def test_made_again_after_a_factor_is_written_to(module):
    for index in range(2):
        decode(module)
        with torch.no_grad():
            leaves(module)[index].weight.mul_(2)
        decode(module)


def test_made_again_after_a_factor_is_replaced(module):
    for index in range(2):
        decode(module)
        layer = leaves(module)[index]
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        decode(module)


def test_made_again_after_a_load(module):
    decode(module)
    module.load_state_dict({name: t * 3 if t.is_floating_point() else t for name, t in module.state_dict().items()})
    decode(module)


def test_made_again_after_the_order_changes(module):
    if not hasattr(module, "order"):
        pytest.skip("has no order")
    decode(module)
    module.order.copy_(module.order.flip(0))
    decode(module)


def test_forgotten_with_a_change_of_dtype(module):
    decode(module)
    module.double()
    assert module._decoding is None
    module.float()
    decode(module)


def test_bias_is_read_every_time(module):
    decode(module)
    with torch.no_grad():
        offset_of(module).add_(1)
    decode(module)


def test_forgotten_while_a_factor_is_wrapped(module):
    decode(module)
    name, layer = next((n, c) for n, c in module.named_children() if isinstance(c, nn.Linear))
    setattr(module, name, nn.Sequential(layer))
    with torch.no_grad():
        module(torch.randn(1, N))
    layer.weight.data += 1.0  # as adapters merge, which leaves no trace on the weight
    setattr(module, name, layer)
    decode(module)


def test_hooks_on_a_factor_run(module):
    seen = []
    for layer in leaves(module):
        layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        module(torch.randn(1, N))
        module(torch.randn(2, 9, N))
    assert len(seen) == 4


def test_offloaded_factors(module):
    x = torch.randn(1, N)
    with torch.no_grad():
        expected = expected_of(module, x)
        cpu_offload(module, torch.device("cpu"))
        assert leaves(module)[0].weight.device.type == "meta"
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module(x.expand(9, N)), expected.expand(9, M), atol=1e-5, rtol=1e-5)


def test_mixed_precision(module):
    x = torch.randn(1, N)
    with torch.no_grad():
        expected = expected_of(module, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(module(x).float(), expected, atol=0.2, rtol=0.05)
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_inference_tensors():
    with torch.inference_mode():
        module = host(lowrank()).eval()
        x = torch.randn(1, N)
        torch.testing.assert_close(module(x), nn.functional.linear(x, map_of(module).dense()), atol=1e-5, rtol=1e-5)


def test_functional_transforms(module):
    parameters = {name: torch.stack((p.detach(), 2 * p.detach())) for name, p in module.named_parameters()}
    x = torch.randn(1, N)
    with torch.no_grad():
        both = torch.vmap(lambda values: torch.func.functional_call(module, values, (x,)))(parameters)
        torch.testing.assert_close(both[0], module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_on_the_host_are_called(module, register, everywhere):
    decode(module)
    seen = []
    target = nn.modules.module if everywhere else module
    name = register.replace("register_", "register_module_") if everywhere else register
    handle = getattr(target, name)(lambda called, *_: seen.append(called))
    try:
        decode(module)
    finally:
        handle.remove()
    assert seen.count(module) == 1
    decode(module)
    assert seen.count(module) == 1


def test_a_replaced_forward_is_called(module):
    decode(module)
    module.forward = lambda x: "replaced"
    with torch.no_grad():
        assert module(torch.randn(1, N)) == "replaced"
    del module.forward
    decode(module)


def test_keywords_arrive(module):
    decode(module)
    with torch.no_grad():
        x = torch.randn(1, N)
        torch.testing.assert_close(module(x=x), expected_of(module, x), atol=1e-5, rtol=1e-5)


def test_made_again_after_a_factor_gets_other_memory(module):
    for index in range(2):
        decode(module)
        weight = leaves(module)[index].weight
        weight.data = weight.data * 2  # as moving or casting the factor alone does
        decode(module)


def test_a_replaced_forward_of_a_factor_is_called(module):
    decode(module)
    seen, layer = [], leaves(module)[0]
    original = layer.forward
    layer.forward = lambda x: seen.append(x) or original(x)
    decode(module)
    assert seen


def test_left_out_of_copies(module):
    decode(module)
    assert copy.deepcopy(module)._decoding is None


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_factors_are_called_once_there(module, kind):
    decode(module)
    called = []
    for layer in leaves(module):
        getattr(layer, kind)(lambda *_: called.append(1))
    decode(module)
    assert len(called) == len(leaves(module))


@torch.no_grad()
def test_sums_and_products_of_small_maps_keep_a_dense_weight_until_any_part_changes():
    sparse = Bitmap(torch.rand(4, 3), torch.tensor([[0b0111], [0b1011], [0b1101], [0b1110]], dtype=torch.uint8), 4, 3)
    inner = Product((sparse, Dense(torch.randn(4, 5))))
    layer, x = host(Sum((LowRank(torch.randn(4, 2), torch.randn(2, 5)), inner)), torch.randn(4)), torch.randn(3, 5)

    def gives_its_map() -> bool:
        return torch.allclose(layer(x), map_of(layer)(x) + layer.bias, atol=1e-5)

    assert gives_its_map()
    kept = layer.temporary_dense()
    assert kept is not None
    assert layer.temporary_dense() is kept
    for name in ("0.up.weight", "0.down.weight", "1.0.values", "1.1.weight", "bias"):
        layer.get_parameter(name).mul_(2)
        assert gives_its_map(), name
    layer.get_submodule("1.0").bits.copy_(layer.get_submodule("1.0").bits.flip(0))
    assert gives_its_map()
    layer.set_submodule("1.1", nn.Linear(5, 4, bias=False))
    assert gives_its_map()
    calls = []
    handle = layer.get_submodule("0.up").register_forward_hook(lambda *_: calls.append(1))
    assert gives_its_map()
    assert len(calls) == 1
    handle.remove()
    layer.set_submodule("1.1", nn.Sequential(nn.Linear(5, 4, bias=False)))  # as adapters wrap it
    assert layer.temporary_dense() is None
    assert layer(x).shape == (3, 4)
