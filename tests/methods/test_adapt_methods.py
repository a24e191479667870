"""Each method of adaptation: its start, what it trains, that it learns, merges and leaves no trace, and its point."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import eckart
from eckart.errors import EckartError
from eckart.hosts import AdaptedHost, map_of
from eckart.hosts.adapter import Inner
from eckart.maps import in_one_dtype

HIDDEN, INNER = 32, 48


@dataclass(frozen=True)
class Case:
    """A method with small settings.

    Attributes:
        method: its name.
        settings: settings.
        count: numbers trained in a layer, from its weight (m, n).
        merges: whether a matrix stands for the adapted layer.
        exact: whether it starts as the base to rounding.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    count: Callable[[Tensor], int] = lambda w: 0
    merges: bool = True
    exact: bool = True


CASES = [
    Case("lora", {"rank": 4}, lambda w: 4 * sum(w.shape)),
    Case("sara", {"threshold": 5e-3}, lambda w: int((w.abs() < 5e-3).sum())),
    Case("sara", {"threshold": 5e-3, "nuclear": 5e-6}, lambda w: int(((w.abs() < 5e-3) & (w != 0)).sum())),
    Case("lift", {"rank": 4, "budget": 2}, lambda w: 2 * sum(w.shape)),
    Case("lift", {"select": "gradient", "budget": 2}, lambda w: 2 * sum(w.shape)),
    Case("lift", {"select": "small", "budget": 2}, lambda w: 2 * sum(w.shape)),
    Case("switchlora", {"rank": 4}, lambda w: 4 * sum(w.shape)),
    Case("s2ft", {"channels": 3}, lambda w: 3 * min(w.shape)),
    Case("s2ft", {"channels": 3, "side": "outputs", "select": "norm"}, lambda w: 3 * w.shape[1]),
    Case("spp", {"rank": 4}, lambda w: 4 * w.shape[1] + w.shape[0]),
    Case("lors", {"rank": 4}, lambda w: 4 * sum(w.shape)),
    Case("sqft", {"rank": 4}, lambda w: 4 * sum(w.shape)),
    Case("snella", {"rank": 4}, lambda w: 4 * sum(w.shape), exact=False),
    Case("flylora", {"rank": 8, "kept": 3}, lambda w: 8 * w.shape[0], merges=False),
    Case("spectralft", {"rank": 3, "top": 6}, lambda w: 3 * (sum(w.shape) + 12)),
    Case("flora", {"rank": 4}, lambda w: 16 + 4 * sum(w.shape)),
    Case("mps", {"rank": 3, "sites": 2}, lambda w: mps_count(w, 3)),
    Case("tlora", {"rank": 3, "sites": 2}, lambda w: tlora_count(w, 3)),
    Case("sparselora", {"rank": 4, "units": 0.5, "dense": 2}, lambda w: 4 * sum(w.shape)),
    Case("vera", {"rank": 40}, lambda w: w.shape[0] + 40),
    Case("ia3", {}, lambda w: max(w.shape)),
    Case("ia3", {"side": "inputs"}, lambda w: w.shape[1]),
    Case("loha", {"rank": 3}, lambda w: 6 * sum(w.shape)),
    Case("lokr", {"rank": 3}, lambda w: lokr_count(w, 3)),
    Case("lokr", {"rank": 4}, lambda w: lokr_count(w, 4)),
    Case("hira", {"rank": 8}, lambda w: 8 * sum(w.shape)),
]


def lokr_count(weight: Tensor, rank: int) -> int:
    (a, c), (b, d) = (split(size) for size in weight.shape)
    return a * b + (c * d if 2 * rank >= max(c, d) else rank * (c + d))


def mps_count(weight: Tensor, bond: int) -> int:
    (a, b), (c, d) = (split(size) for size in weight.shape)
    return bond * a + bond * b * bond + bond * c * bond + bond * d


def tlora_count(weight: Tensor, bond: int) -> int:
    (a, b), (c, d) = (split(size) for size in weight.shape)
    return bond * (c * c + d * d) + bond * (a * c + b * d)


def split(size: int) -> tuple[int, int]:
    """Return the two factors of a size that are nearest to each other."""
    pairs = [(d, size // d) for d in range(1, size + 1) if size % d == 0]
    return min(pairs, key=lambda pair: abs(pair[0] - pair[1]))


def named(cases: list[Case]) -> list[Any]:
    return [pytest.param(c, id=" ".join((c.method, *(str(v) for v in c.settings.values())))) for c in cases]


every = pytest.mark.parametrize("case", named(CASES))
merging = pytest.mark.parametrize("case", named([c for c in CASES if c.merges]))


def base() -> LlamaForCausalLM:
    """A small model of which half of each weight inside the blocks is zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(torch.rand_like(weight) < 0.5)
    return model.eval()


IDS = torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(1))


def adapted(case: Case, **more: Any) -> nn.Module:
    return eckart.adapt(base(), case.method, data=[IDS], **case.settings, **more)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def trained(model: nn.Module, steps: int = 10, rate: float | None = None) -> list[float]:
    """Train for a few steps and return the losses; the model is left in evaluation mode."""
    torch.manual_seed(0)
    handle, losses = eckart.adapters(model), []
    optimizer = torch.optim.AdamW(handle.parameter_groups(rate, weight_decay=0.0))
    model.train()
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        (loss + handle.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    losses.append(model(IDS, labels=IDS).loss.item())
    return losses


def layers(model: nn.Module) -> dict[str, AdaptedHost]:
    return eckart.adapters(model).layers


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrix of every adapted layer."""
    return {name: layer.held_map().dense().detach() for name, layer in layers(model).items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's matrix of every adapted layer."""
    return {name: layer.base.weight.detach() for name, layer in layers(model).items()}


@every
def test_starts_as_the_base(case: Case):
    off = (logits(adapted(case)) - logits(base())).abs().max()
    assert off < (1e-5 if case.exact else 5e-3)


@every
def test_trains_as_many_numbers_as_the_formula_says(case: Case):
    model = adapted(case)
    assert eckart.adapters(model).count() == sum(case.count(w) for w in weights(model).values())


@every
def test_learns(case: Case):
    losses = trained(adapted(case), rate=5e-3)
    assert losses[-1] < losses[0] - 1e-3
    assert all(math.isfinite(loss) for loss in losses)


@merging
def test_merged_equals_unmerged(case: Case):
    model = adapted(case)
    trained(model, rate=5e-3)
    handle, before = eckart.adapters(model), logits(model)
    lost = handle.merge()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    assert max(lost.values()) < 1e-6
    handle.unmerge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("case", named([c for c in CASES if not c.merges]))
def test_what_is_no_matrix_refuses_to_merge(case: Case):
    model = adapted(case)
    with pytest.raises(EckartError, match="depends on"):
        eckart.adapters(model).merge()


@every
def test_removal_restores_every_bit(case: Case):
    model = adapted(case)
    trained(model, steps=2)
    restored, wanted = eckart.adapters(model).remove(), base()
    assert not any(isinstance(module, AdaptedHost) for module in restored.modules())
    state = restored.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())


@every
def test_gradient_checkpointing_changes_nothing(case: Case):
    plain, checkpointed = adapted(case), adapted(case)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert trained(plain, steps=3) == pytest.approx(trained(checkpointed, steps=3), rel=1e-5)


@every
def test_requests_get_their_own_adapter(case: Case):
    model = adapted(case)
    trained(model, rate=5e-3)
    alone, handle = logits(model), eckart.adapters(model)
    eckart.adapt(model, "lora", name="other", rank=2)
    trained(model, rate=5e-2)
    other = logits(model)
    with handle.requests(["default", None, "other", "default"]):
        mixed = logits(model)
    wanted = torch.stack((alone[0], logits(base())[1], other[2], alone[3]))
    torch.testing.assert_close(mixed, wanted, atol=1e-5, rtol=1e-4)


@merging
def test_composes_with_another_adapter(case: Case):
    """The one named first is nearest to the weight; what is computed is what the composed maps say, in both orders."""
    model = adapted(case)
    trained(model, rate=5e-3)
    handle = eckart.adapters(model)
    eckart.adapt(model, "lora", name="other", rank=2)
    trained(model, rate=5e-2)
    for order in (("default", "other"), ("other", "default")):
        handle.use(*order)
        x = torch.randn(3, HIDDEN)
        for name, layer in layers(model).items():
            if "gate" in name:
                with torch.no_grad():
                    torch.testing.assert_close(layer(x), x @ matrices(model)[name].mT, atol=1e-5, rtol=1e-4)
    losses = trained(model, steps=4)
    assert losses[-1] < losses[0]


@every
@pytest.mark.parametrize("autocast", [False, True])
def test_works_in_half_precision(case: Case, autocast: bool):
    """On a base of bfloat16 and under autocast the outputs keep their dtype and every gradient arrives."""
    model = base() if autocast else base().to(torch.bfloat16)
    eckart.adapt(model, case.method, data=[IDS], **case.settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    with torch.no_grad():
        for p in parameters:
            p.add_(1e-3)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in parameters)
    assert all(p.grad.any() for p in parameters if p.numel() > 1)


@every
def test_the_same_seed_starts_the_same(case: Case):
    states = [eckart.adapters(adapted(case, seed=seed)).layers for seed in (3, 3)]
    for name, layer in states[0].items():
        other = states[1][name].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in layer.state_dict().items())


# What each one is for.


def changed(model: nn.Module) -> dict[str, Tensor]:
    """Return where the matrix of every layer differs from the base's."""
    made, held = matrices(model), weights(model)
    return {name: made[name] != held[name] for name in held}


def test_sara_changes_only_small_weights():
    model = adapted(CASES[1])
    trained(model)
    for name, where in changed(model).items():
        small = weights(model)[name].abs() < 5e-3
        assert where.any()
        assert not (where & ~small).any()


def test_sara_refuses_a_layer_without_small_weights():
    model = base()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(1.0)
    with pytest.raises(EckartError, match=r"layers\.1\.mlp\.up_proj has no weight below threshold=0.005; .* is 1"):
        eckart.adapt(model, "sara", threshold=5e-3)
    assert not any(isinstance(module, AdaptedHost) for module in model.modules())


def test_sara_penalizes_the_nuclear_norm_of_what_trains():
    handle = eckart.adapters(adapted(CASES[2]))
    small = [w * (w.abs() < 5e-3) for w in weights(handle.model).values()]
    wanted = sum(torch.linalg.svdvals(w.double()).sum() for w in small)
    assert handle.penalty().item() == pytest.approx(5e-6 * float(wanted), rel=1e-4)
    handle.penalty().backward()
    values = [p.grad for p in handle.model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and g.any() for g in values)


@pytest.mark.parametrize(
    ("select", "score"),
    [
        ("magnitude", lambda w: w.abs()),
        ("small", lambda w: -w.abs()),
        ("principal", lambda w: truncated(w, 2).abs()),
    ],
)
def test_lift_changes_only_the_entries_of_the_largest_score(select: str, score: Callable[[Tensor], Tensor]):
    model = eckart.adapt(base(), "lift", rank=2, budget=2, select=select)
    trained(model)
    for name, where in changed(model).items():
        w = weights(model)[name]
        least = score(w).flatten().topk(2 * sum(w.shape)).values[-1]
        assert where.sum() > sum(w.shape)
        assert (score(w)[where] >= least - 1e-5).all()


def truncated(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def test_s2ft_trains_the_same_hidden_units_of_an_mlp():
    model = eckart.adapt(base(), "s2ft", channels=3)
    trained(model)
    where = changed(model)
    for i in range(2):
        up, gate, down = (where[f"model.layers.{i}.mlp.{name}_proj"] for name in ("up", "gate", "down"))
        assert torch.equal(up.any(1), gate.any(1))
        assert torch.equal(up.any(1), down.any(0))
        assert up.any(1).sum() == 3


@pytest.mark.parametrize("method", ["spp", "lors", "sqft", "hira"])
def test_a_sparse_weight_stays_as_sparse(method: str):
    model = eckart.adapt(base(), method, rank=4)
    trained(model, rate=1e-2)
    for name, where in changed(model).items():
        assert where.float().mean() > 0.3
        assert not (where & (weights(model)[name] == 0)).any()
    folded = eckart.adapters(model).fold()
    zeros = [(p == 0) for name, p in folded.named_parameters() if "proj" in name]
    assert all(torch.equal(z, p == 0) for z, (n, p) in zip(zeros, pruned(), strict=True))


def pruned() -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in base().named_parameters() if "proj" in name]


@pytest.mark.parametrize("method", ["spp", "lors", "hira"])
def test_a_layer_of_a_sparse_map_is_adapted_and_merged_on_its_support(method: str):
    weight = pruned()[0][1].detach()
    model = nn.ModuleDict({"layer": eckart.host(eckart.maps.sparse(weight))})
    eckart.adapt(model, method, rank=2, targets=["layer"])
    handle = eckart.adapters(model)
    with torch.no_grad():
        for p in handle.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(5, HIDDEN)
    before = model["layer"](x)
    assert handle.merge()["layer"] < 1e-6
    torch.testing.assert_close(model["layer"](x), before, atol=1e-5, rtol=1e-4)


def test_sqft_draws_ranks_in_training_only():
    model = eckart.adapt(base(), "sqft", rank=4)
    trained(model, rate=1e-2)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        model.train()
        assert len({float(model(IDS, labels=IDS).loss) for _ in range(8)}) > 1


def test_snella_changes_a_share_of_the_entries():
    model = eckart.adapt(base(), "snella", rank=4, density=0.1)
    trained(model, rate=1e-2)
    for where in changed(model).values():
        assert where.float().mean() <= 0.1 + 1e-3
        assert where.float().mean() > 0.05


def test_flylora_uses_a_few_parts_per_token():
    model = eckart.adapt(base(), "flylora", rank=8, kept=3)
    change = next(iter(layers(model).values())).adapter("default").chain()[0]
    with torch.no_grad():
        change.up.copy_(torch.eye(change.up.shape[0], 8))
    x = torch.randn(7, HIDDEN)
    zero = Inner(lambda x: torch.zeros(*x.shape[:-1], change.up.shape[0]), lambda: None)
    used = change.call(x, zero)[:, :8]
    hidden = x @ map_of(change.down).dense().mT
    assert (used.count_nonzero(1) == 3).all()
    kept = hidden.abs() >= hidden.abs().topk(3, dim=1).values[:, -1:]
    torch.testing.assert_close(used, 8.0 * hidden * kept)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_flylora_balances_once_for_every_batch_that_trains(checkpointed: bool):
    model = eckart.adapt(base(), "flylora", rank=8, kept=3)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    biases = [layer.adapter("default").chain()[0].bias for layer in layers(model).values()]
    logits(model.train())
    assert not any(bias.any() for bias in biases)
    for step in range(1, 4):
        model(IDS, labels=IDS).loss.backward()
        for bias in biases:
            assert bias.any()
            assert bias.abs().max() <= step * 1e-3 + 1e-9
    assert all((bias > 0).any() and (bias < 0).any() for bias in biases)
    model.eval()(IDS, labels=IDS).loss.backward()
    assert all(bias.abs().max() <= 3e-3 + 1e-9 for bias in biases)


def test_spectralft_moves_the_top_singular_vectors_only():
    model = eckart.adapt(base(), "spectralft", rank=3, top=6)
    trained(model, rate=1e-2)
    for name, made in matrices(model).items():
        left, values, right = torch.linalg.svd(weights(model)[name], full_matrices=False)
        rest = (left[:, 6:] * values[6:]) @ right[6:]
        moved = torch.linalg.svdvals(made - rest)
        assert moved[0] > 1e-3
        assert moved[6:].max() < 1e-5


@pytest.mark.parametrize("rank", [3, 4])
def test_lokr_is_one_kronecker_product(rank: int):
    model = eckart.adapt(base(), "lokr", rank=rank, alpha=2.0)
    trained(model, rate=1e-2)
    for name, made in matrices(model).items():
        (m, n), (a, b) = made.shape, (split(size)[0] for size in made.shape)
        change = (made - weights(model)[name]).reshape(a, m // a, b, n // b).transpose(1, 2).reshape(a * b, -1)
        values = torch.linalg.svdvals(change.double())
        assert values[0] > 1e-3
        assert values[1] < 1e-5
        block = change.norm(dim=1).argmax()
        inner = torch.linalg.svdvals(change[block].view(m // a, n // b).double())
        assert (inner > 1e-6).sum() <= (rank if 2 * rank < max(m // a, n // b) else min(m // a, n // b))


def test_loha_hira_ia3_and_vera_are_their_formulas():
    """Every map beside what plain torch makes of the same numbers."""
    for method, settings in (
        ("loha", {"rank": 3, "alpha": 2.0}), ("hira", {"rank": 3}), ("ia3", {}), ("vera", {"rank": 5}),
    ):  # fmt: skip
        model = eckart.adapt(base(), method, **settings)
        trained(model, rate=1e-2)
        for name, made in matrices(model).items():
            weight, (change,) = weights(model)[name], layers(model)[name].adapter("default").chain()
            p = {key: parameter.detach() for key, parameter in change.named_parameters()}
            if method == "loha":
                products = (p[f"delta.{side}.up.weight"] @ p[f"delta.{side}.down.weight"] for side in ("left", "right"))
                wanted = weight + 2.0 / 3 * torch.mul(*products)
            elif method == "hira":
                wanted = weight * (1 + p["factor.up.weight"] @ p["factor.down.weight"])
            elif method == "ia3":
                wanted = weight * (p["right.scale"] if weight.shape[1] > weight.shape[0] else p["left.scale"][:, None])
            else:
                inner = p["delta.2.scale"][:, None] * p["delta.3.weight"]
                wanted = weight + (p["delta.0.scale"][:, None] * p["delta.1.weight"]) @ inner
            torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)
            assert (made - weight).abs().max() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("method", "rank"), [("loha", 2), ("loha", 3), ("hira", 2)])
def test_an_entrywise_product_trains_as_written_out_and_is_not_kept(method: str, rank: int, bias: bool):
    torch.manual_seed(0)
    m, n, t = 48, 40, 6
    model = eckart.adapt(nn.Sequential(nn.Linear(n, m, bias=bias)), method, targets=["0"], rank=rank).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data.normal_()
    x = torch.randn(2, t // 2, n, dtype=torch.float64, requires_grad=True)
    held: list[int] = []
    keep = {id(p) for p in model.parameters()} | {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: held.append(0 if kept.data_ptr() in keep else kept.numel()) or kept, lambda kept: kept
    ):
        got = model(x)
    assert max(held) < m * n / 2
    layer = layers(model)["0"]
    written = layer.held_map().dense()
    assert written.requires_grad
    offset = layer.base.bias
    plain = x @ written.mT if offset is None else x @ written.mT + offset
    torch.testing.assert_close(got, plain, atol=1e-10, rtol=0)
    seed = torch.randn_like(got)
    found = torch.autograd.grad(got, [x, *parameters], seed)
    for one, other in zip(found, torch.autograd.grad(plain, [x, *parameters], seed), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_a_matrix_product_state_of_two_sites_is_lora():
    adapter = next(iter(layers(eckart.adapt(base(), "mps", rank=3, sites=1)).values())).adapter("default")
    held = map_of(adapter.chain()[0].delta)
    with torch.no_grad():
        held.entries.normal_()
    up, down = (core.squeeze() for core in held.cores())
    torch.testing.assert_close(held.dense(), up @ down)


def test_tlora_is_a_transform_and_a_residual():
    model = eckart.adapt(base(), "tlora", rank=3, sites=2)
    trained(model, rate=1e-2)
    for name, made in matrices(model).items():
        times, plus = layers(model)[name].adapter("default").chain()
        transform, residual = map_of(times.right).dense(), map_of(plus.delta).dense()
        assert (transform - torch.eye(len(transform))).abs().max() > 1e-3
        assert residual.abs().max() > 1e-3
        torch.testing.assert_close(made, weights(model)[name] @ transform + residual, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("sara", {"threshold": 0.0}, "threshold must be positive"),
        ("lift", {"rank": 4, "budget": 100}, "entries are more than"),
        ("lift", {"budget": 0}, "budget must be at least 1"),
        ("s2ft", {"channels": 33, "side": "inputs"}, "33 channels are more than the 32 inputs"),
        ("sqft", {"rank": 6}, "divisible by 4"),
        ("snella", {"rank": 3}, "must be even"),
        ("flylora", {"rank": 4, "kept": 5}, "kept must be 1 to rank"),
        ("spectralft", {"rank": 8, "top": 4}, "top must be at least the rank"),
        ("mps", {"sites": 0}, "sites must be at least 1"),
    ],
)
def test_bad_settings_are_refused(method: str, settings: dict[str, Any], words: str):
    model = base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EckartError, match=words):
        eckart.adapt(model, method, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::eckart.errors.CostWarning")
@pytest.mark.parametrize("second", ["hira", "spp", "dora"])
@pytest.mark.parametrize("first", ["lora", "ia3", "oft", "loha"])
def test_what_reads_an_adapted_weight_reads_one_in_half_precision(first: str, second: str):
    net = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24)).bfloat16()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(4)).bfloat16()
    sizes = {"ia3": {}, "oft": {"block": 8}}
    for name, method in (("a", first), ("b", second)):
        eckart.adapt(net, method, name=name, targets=["0", "1"], **sizes.get(method, {"rank": 4}))
    handle = eckart.adapters(net)
    with torch.no_grad():
        for parameter in (p for layer in handle.layers.values() for a in layer.adapters.values() for p in a.trained()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    for names in (("a", "b"), ("b", "a")):
        handle.use(*names)
        y = net(x)
        y.float().square().mean().backward()
        handle.merge()
        assert (net(x) - y).float().norm() < 0.05 * y.float().norm()
        handle.unmerge()


@pytest.mark.parametrize("method", ["lors", "lift", "spp", "hira", "sara"])
def test_small_changes_of_a_weight_in_half_precision_are_not_rounded_away(method: str):
    """Each is far below half of the last bit of its weight, and together they are what the output is."""
    net = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    settings = {"sara": {"threshold": 2.0}, "lift": {"rank": 2, "budget": 32}, "hira": {"rank": 1}}
    eckart.adapt(net, method, targets=["0"], **settings.get(method, {"rank": 1, "alpha": 1.0}))
    signs = torch.ones(64).index_fill(0, torch.arange(0, 64, 2), -1.0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("values"):
                columns = net.get_buffer(name.replace("values", "columns"))
                parameter.copy_(1e-3 * signs[columns.long()])
            elif parameter.requires_grad:
                parameter.copy_(signs if "down" in name or "columns" in name else torch.full_like(parameter, 1e-3))
        matrix = in_one_dtype(net[0].held_map()).dense()
        assert (matrix - 1.0).abs().max() < 1.1e-3
        torch.testing.assert_close(net(signs.bfloat16()).float(), matrix @ signs, atol=1e-3, rtol=0.02)
        assert (matrix @ signs).abs().min() > 0.03


class Wide(TorchDispatchMode):
    """Notes the largest tensor of float32 that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.dtype == torch.float32]
        self.most = max([self.most, *(t.numel() for t in made)])
        return out


@pytest.mark.parametrize("how", ["dropout", "weight", "second", "before"])
def test_rescaled_rows_of_half_precision_make_no_wide_copy_of_the_weight(how: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96, bias=False)).bfloat16()
    for name, method in (("a", "dora"), ("b", "lora")):
        dropout = {"dropout": 0.5} if how == "dropout" and method == "dora" else {}
        eckart.adapt(net, method, name=name, rank=4, targets=["0"], **dropout)
    layer, handle = net[0], eckart.adapters(net)
    with torch.no_grad():
        for parameter in (p for name in "ab" for p in layer.adapter(name).trained()):
            parameter += 0.1 * torch.randn_like(parameter)
    weights = {
        "dropout": {"a": 1},
        "weight": {"b": 0.7, "a": 0.5},
        "second": {"a": 1, "b": 1},
        "before": {"b": 1, "a": 1},
    }
    handle.use(**weights[how])
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    net.train(how == "dropout")
    with Wide() as seen:
        net(x).float().square().sum().backward()
    assert 0 < seen.most < 64 * 96
    with torch.no_grad():
        dense = in_one_dtype(layer.held_map()).dense()
        torch.testing.assert_close(net.eval()(x).float(), x.float() @ dense.mT, atol=0.05, rtol=0.02)


def test_rescaled_rows_of_half_precision_train_with_dropout_and_weights():
    net = eckart.adapt(nn.Sequential(nn.Linear(24, 32)).bfloat16(), "dora", rank=4, dropout=0.1, targets=["0"]).train()
    x = torch.randn(5, 24).bfloat16()
    net(x).float().square().mean().backward()
    eckart.adapters(net.eval()).use(default=0.5)
    assert net(x).dtype == torch.bfloat16
