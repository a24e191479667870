"""Adaptive-rank attention: exact at full rank, never worse than its bound, undone and loaded again to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import eckart
from eckart.errors import EckartError
from eckart.hosts.attention import BoundedRank, Errors, FixedRank, LearnedRank, RankGate
from eckart.linalg import score_errors
from eckart.maps import Gated
from eckart.methods.attention import gated, measured, policies

POLICIES = ("fixed", "bound", "learned")
IDS = torch.arange(64)[None] * 7 % 500


@pytest.fixture
def model(demo):
    return AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, **options) -> torch.Tensor:
    return model(IDS, use_cache=False, **options).logits


def random_heads(seed: int, h: int, g: int, q: int, t: int, d: int):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(2, 1, h, 1, d, dtype=torch.float64, generator=generator) * 3
    query = torch.randn(2, h, g, q, d, dtype=torch.float64, generator=generator) * scales[0][:, :, None]
    key = torch.randn(2, h, t, d, dtype=torch.float64, generator=generator) * scales[1]
    moments = [(x.mT @ x).sum(0) for x in (query.flatten(2, 3), key)]
    return query, key, gated(*moments)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 1 << 16), st.floats(0.01, 3.0), st.booleans())
def test_the_bound_is_never_violated_and_the_error_of_the_scores_is_exact(size, seed, scale, causal):
    h, g, q, t, d = size
    query, key, map_ = random_heads(seed, h, g, q, t, d)
    up, down = map_.up.double(), map_.down.double()
    left, right = query @ up[:, None], key @ down.mT
    ranks = range(d + 1)
    bound, error = score_errors(left, right, ranks, scale)
    # against a softmax of the scores themselves, with any mask
    mask = torch.ones(q, t, dtype=torch.bool).tril(t - q) if causal and t >= q else torch.ones(q, t, dtype=torch.bool)
    exact = scale * left @ right.mT[:, :, None]
    for i, rank in enumerate(ranks):
        changed = scale * left[..., :rank] @ right[..., :rank].mT[:, :, None]
        torch.testing.assert_close(error[:, i], (exact - changed).square().mean((1, 2, 3, 4)).sqrt())
        p, q_ = (s.masked_fill(~mask, -torch.inf).softmax(-1) for s in (exact, changed))
        moved = 0.5 * (p - q_).abs().sum(-1).mean((1, 2, 3))
        assert bool((moved <= bound[:, i] + 1e-9).all())
    assert bool((bound.diff(dim=1) <= 1e-12).all())
    assert bool((bound[:, -1] == 0).all())
    assert bool((error[:, -1] == 0).all())


def test_the_bound_is_reached():
    # one key component that is dropped, and a query that sees it with both signs
    left, right = torch.ones(1, 1, 1, 1, 1), torch.tensor([[[[1.0], [-1.0]]]])
    bound, _ = score_errors(left, right, [0], 0.7)
    p = torch.tensor([0.7, -0.7]).softmax(0)
    # from the uniform distribution the odds move by e^1.4; between its two ends they move by twice that
    assert (0.5 * (p - p.flip(0)).abs().sum()).item() == pytest.approx(float(torch.tanh(torch.tensor(0.7))))
    assert bound.item() == pytest.approx(float(torch.tanh(torch.tensor(0.35))))
    assert 0.5 * (p - 0.5).abs().sum() <= bound.item() + 1e-7


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 1 << 16))
def test_every_rank_is_the_best_of_that_rank(size, seed):
    h, g, _, _, d = size
    query, key, map_ = random_heads(seed, h, g, 2 * d, 2 * d, d)
    for head in range(h):
        whole = map_.at(d, head).dense().double()
        torch.testing.assert_close(whole, torch.eye(d, dtype=torch.float64), rtol=0, atol=2e-3)
        # singular values of R_q R_k^T, whose squares past the rank are the least error there is
        moments = [(x.mT @ x).sum(0) for x in (query[:, head].flatten(1, 2), key[:, head])]
        roots = [torch.linalg.cholesky(m / m.diagonal().mean() * 0.999 + 1e-3 * torch.eye(d)) for m in moments]
        least = torch.linalg.svdvals(roots[0].mT @ roots[1]).square().flip(0).cumsum(0).flip(0)
        for rank in range(1, d):
            off = torch.eye(d, dtype=torch.float64) - map_.at(rank, head).dense().double()
            found = (roots[0].mT @ off @ roots[1]).square().sum()
            torch.testing.assert_close(found, least[rank], rtol=1e-3, atol=1e-4 * float(least[0]))


def test_gated_maps():
    up, down = torch.randn(2, 5, 3), torch.randn(2, 3, 4)
    map_ = Gated(up, down, (1, 3))
    x, y = torch.randn(6, 2, 7, 4), torch.randn(6, 2, 7, 5)
    for rank in (1, 2, 3):
        matrices = torch.stack([map_.at(rank, head).dense() for head in range(2)])
        torch.testing.assert_close(map_(x, rank), x @ matrices.mT)
        inner = (map_.left(y, rank) * map_.right(x, rank)).sum(-1)
        torch.testing.assert_close(inner, (y * map_(x, rank)).sum(-1))
    assert (map_.shape, map_.rank, repr(map_)) == ((5, 4), 3, "Gated[2 of 5x4](ranks=(1, 3))")
    with pytest.raises(EckartError, match="another rank for every input, so no matrix stands for it"):
        map_.dense()
    for wrong in ((3, 1), (1, 2), (), (1, 1, 3), (-1, 3)):
        with pytest.raises(EckartError, match="ascending ones up to 3"):
            Gated(up, down, wrong)
    with pytest.raises(EckartError, match=r"\(h, m, k\) and \(h, k, n\)"):
        Gated(up, down[:1], (1, 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_full_rank_is_exact(policy, model, text):
    before = logits(model)
    adapted = eckart.adaptive_attention(model, text, policy=policy, rank=1.0, samples=2, length=64)
    for gate in adapted.gates.values():
        gate.policy = FixedRank(len(gate.ranks) - 1)
    assert torch.equal(logits(model), before)
    assert adapted.mean_rank() == 1.0


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_keep_to_the_rank_are_saved_and_undone(policy, model, demo, text, tmp_path):
    before, keys = logits(model), set(model.state_dict())
    adapted = eckart.adaptive_attention(model, text, policy=policy, rank=0.6, samples=4, length=64)
    assert len(adapted.gates) == model.config.num_hidden_layers
    assert set(model.state_dict()) == keys
    changed = logits(model)
    assert 0.1 < adapted.mean_rank() < 0.9
    assert not torch.equal(changed, before)
    adapted.save(tmp_path / "attention.safetensors")
    other = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    loaded = eckart.load_attention(other, tmp_path / "attention.safetensors")
    assert torch.equal(logits(other), changed)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "attention.safetensors").read_bytes()
    adapted.remove()
    assert torch.equal(logits(model), before)
    again = eckart.adaptive_attention(model, text, policy=policy, rank=0.6, samples=4, length=64)
    assert torch.equal(logits(model), changed)
    again.remove()


def test_padding_batches_and_new_tokens(model, text):
    adapted = eckart.adaptive_attention(model, text, policy="fixed", rank=0.5, samples=2, length=64)
    alone = logits(model)
    mask = torch.ones(2, 72, dtype=torch.int64)
    mask[0, 64:] = 0
    ids = torch.cat([IDS, torch.full((1, 8), 3)], 1).repeat(2, 1)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(batch[:1, :64], alone, rtol=1e-3, atol=1e-4)
    adapted.reset()
    with torch.no_grad():
        out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert out.shape[1] > IDS.shape[1]
    assert all(gate.calls == 1 for gate in adapted.gates.values())  # the prompt; single tokens stay exact


def test_what_policies_choose(model, text):
    ids = list(torch.arange(8 * 64).view(8, 1, 64) * 11 % 500)
    seen = measured(model, ids, divergences=True)
    shares = {}
    for policy in POLICIES:
        made = policies(policy, seen, 0.5)
        chosen = {n: made[n](layer.errors) for n, layer in seen.items()}
        ranks = torch.cat([torch.tensor(seen[n].map.ranks)[i] / seen[n].map.rank for n, i in chosen.items()])
        shares[policy] = float(ranks.mean())
        assert shares[policy] <= 0.5
        if policy == "bound":
            tolerance = next(iter(made.values())).tolerance
            for name, index in chosen.items():
                bound = seen[name].errors.bound
                assert bool((bound.gather(1, index[:, None]) <= tolerance).all())
                lower = bound.gather(1, (index - 1).clamp_min(0)[:, None])
                assert bool(((lower > tolerance)[:, 0] | (index == 0)).all())
        if policy == "learned":
            lost = sum(float(seen[n].divergence.gather(1, i[:, None]).mean()) for n, i in chosen.items())
            fixed = policies("fixed", seen, shares[policy])
            same = sum(float(seen[n].divergence[:, fixed[n].index].mean()) for n in seen)
            assert lost < same  # than at the largest fixed rank up to the mean one
    assert shares["fixed"] == 0.5


def test_a_learned_policy_follows_its_logits():
    errors = Errors(torch.tensor([[0.9, 0.0], [0.1, 0.0]]), torch.tensor([[2.0, 0.0], [0.1, 0.0]]))
    policy = LearnedRank(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0]))
    assert policy(errors).tolist() == [1, 0]
    assert BoundedRank(0.5)(errors).tolist() == [1, 0]


def test_bad_input(model, text, tmp_path, demo):
    for arguments, message in (
        ({"policy": "greedy"}, "no policy 'greedy'; give one of fixed, bound, learned"),
        ({"rank": 0.0}, "a share of the head dimension"),
        ({"rank": 2}, "a share of the head dimension"),
        ({"length": 8, "samples": 2}, "windows of 8 tokens are too short"),
    ):
        with pytest.raises(EckartError, match=message):
            eckart.adaptive_attention(model, text, **arguments)
        assert model.config._attn_implementation == "sdpa"
    with pytest.raises(EckartError, match="there is no text file"):
        eckart.adaptive_attention(model, tmp_path / "none.txt")
    adapted = eckart.adaptive_attention(model, text, policy="fixed", samples=2, length=64)
    with pytest.raises(EckartError, match="adaptive already"):
        eckart.adaptive_attention(model, text, policy="fixed", samples=2, length=64)
    adapted.save(tmp_path / "a.safetensors")
    adapted.remove()
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    with pytest.raises(EckartError, match="BertForMaskedLM has no attention layer"):
        eckart.load_attention(BertForMaskedLM(config), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:500])
    for name in ("b.safetensors", "none.safetensors"):
        with pytest.raises(EckartError, match="missing, damaged or holds no adaptive attention"):
            eckart.load_attention(model, tmp_path / name)
    with pytest.raises(EckartError, match="holds no adaptive attention"):
        eckart.load_attention(model, demo / "model.safetensors")
    gate = next(iter(adapted.gates.values()))
    wide = RankGate(Gated(torch.eye(4)[None], torch.eye(4)[None], (4,)), gate.policy)
    with pytest.raises(EckartError, match="have 8 dimensions, but its gate is for 4"):
        eckart.files.attention.install(model, {"model.layers.0.self_attn": wide})
