"""Adaptive-rank attention: the scores of long sequences at a rank chosen for every layer and input.

    S = c Q K^T  ~  c (Q U_:r) (V_:r K^T),    min over U, V of rank r of  E (q^T k - q^T U V k)^2

- The factorization of every key head is reduced-rank regression of the identity, measured by the second moments of the
  head's keys and of the queries that meet them; one decomposition serves every rank, and the full one is exact.
- For every input and rank the error of the scores is known exactly and the move of the softmax is bounded, without
  computing a score (`eckart.linalg.score_errors`).
- Policies: "fixed", one rank for all; "bound", the least rank whose bound on the softmax is below a tolerance;
  "learned", logits linear in the logarithms of all errors, one set for every layer, by policy gradient on

      reward = - divergence / scale - price * rank / d

  where the divergence of the model's predictions is measured for every layer, rank and calibration window. As the
  reward of every rank is known, the gradient of the expected reward is exact: nothing is drawn, there is no noise.
- Tolerance and price are the ones whose mean rank over the calibration windows is what was asked for.

Source: "Dynamic Rank Reinforcement Learning for Adaptive Low-Rank Multi-Head Self Attention in Large Language Models",
2025 (DR-RL), which chooses ranks from a perturbation bound by a learned policy; there the factors are decomposed anew
for every input, and the reward is the similarity of attention outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.errors import EckartError
from eckart.files.attention import AdaptiveAttention, attention_of, install, watched
from eckart.files.text import load_tokenizer, read_documents, windows
from eckart.fit import metric, regress
from eckart.hosts.attention import TINY, BoundedRank, Errors, FixedRank, LearnedRank, MomentWatch, Policy, RankGate
from eckart.maps import Gated
from eckart.methods.evaluate import LONGEST_DEFAULT, context_length, require_kind
from eckart.progress import Progress, silent

POLICIES = ("fixed", "bound", "learned")
# Ranks are multiples of an eighth of the head dimension.
PARTS = 8
# Share of the isotropic moment, so that every direction has an order.
SHRINKAGE = 1e-3
STEPS, RATE = 100, 0.2
# Less of it fits the calibration windows instead of what their errors say (docs/LOG.md).
DECAY = 1e-2
BISECTIONS = 12
# Of ten: tolerances and prices that are tried.
EXPONENTS = (-6.0, 3.0)


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """What was measured of one attention layer on all windows.

    Attributes:
        map: its factorizations.
        errors: what every rank would lose, (s, R) each.
        divergence: (s, R) float64, nats per token by which predictions move at every rank; empty if not measured.
    """

    map: Gated
    errors: Errors
    divergence: Tensor


def adaptive_attention(
    model: PreTrainedModel,
    text: str | Path,
    *,
    policy: str = "learned",
    rank: float = 0.5,
    samples: int = 32,
    length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
) -> AdaptiveAttention:
    """Make a decoder compute its attention scores at a rank that is chosen for every layer and input.

    The weights stay as they are. Short calls, such as single new tokens, stay exact.

    Args:
        model: a loaded decoder; changed in place until `remove()` is called on what is returned.
        text: calibration text, as `eckart.compress` takes it.
        policy: "learned", "bound" or "fixed".
        rank: mean rank to use, as a share of the head dimension, in (0, 1]; reached on the calibration text from below.
        samples: calibration windows.
        length: tokens per window; by default the context of the model, 2048 at most.
        tokenizer: that of the model, if its folder is gone.
        progress: called with the stages "moments", "errors" and "divergence".

    Raises:
        EckartError: for an unknown policy, a rank out of range, a model without exchangeable attention, or a text that
            is missing or too short.
    """
    if policy not in POLICIES:
        raise EckartError(f"there is no policy {policy!r}; give one of {', '.join(POLICIES)}")
    if not isinstance(rank, int | float) or isinstance(rank, bool) or not 0.0 < rank <= 1.0:
        raise EckartError(f"rank is a share of the head dimension in (0, 1], got {rank!r}")
    attention_of(model)
    require_kind(model, decoder=True)
    documents = read_documents(Path(text))
    tokenizer = tokenizer or load_tokenizer(Path(model.name_or_path))
    length = length or min(context_length(model) or LONGEST_DEFAULT, LONGEST_DEFAULT)
    batches = windows(tokenizer, documents, samples=samples, length=length, batch=1, held_out=0).batches
    seen = measured(model, batches, divergences=policy == "learned", progress=progress)
    made = policies(policy, seen, rank)
    return install(model, {name: RankGate(layer.map, made[name]) for name, layer in seen.items()})


def measured(
    model: PreTrainedModel, batches: Sequence[Tensor], *, divergences: bool, progress: Progress = silent
) -> dict[str, LayerErrors]:
    """Return the factorizations of every attention layer by name, and what their ranks lose on some windows.

    Args:
        model: a loaded decoder; unchanged afterwards.
        batches: token ids (1, t).
        divergences: whether to measure how predictions move with each layer at each rank: one pass over the windows for
            each of them.
        progress: called with the stages "moments" and then "errors" or "divergence".

    Raises:
        EckartError: if no attention layer is reached, or the windows are too short for a rank to be worth choosing.
    """
    training = model.training
    model.eval()
    try:
        return _errors(model, _maps(model, batches, progress), batches, divergences, progress)
    finally:
        model.train(training)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return cast(Tensor, model(ids.to(model.device), use_cache=False).logits).float().log_softmax(-1)


def _maps(model: PreTrainedModel, batches: Sequence[Tensor], progress: Progress) -> dict[str, Gated]:
    """Return the ordered factorization of every attention layer that the model reaches."""
    watches = {name: MomentWatch() for name, module in model.named_modules() if hasattr(module, "is_causal")}
    with watched(model, watches):
        for i, ids in enumerate(batches):
            progress("moments", i, len(batches))
            _logits(model, ids)
    maps = {
        name: gated(w.queries, w.keys) for name, w in watches.items() if w.queries is not None and w.keys is not None
    }
    if not maps:
        raise EckartError(f"no attention layer of {type(model).__name__} was reached through transformers' interface")
    return maps


def gated(queries: Tensor, keys: Tensor) -> Gated:
    """Return the factorizations of the identity that keep most of the scores at every rank, in float32.

    Args:
        queries: (h, d, d) second moments of the queries that meet each key head, of any scale.
        keys: (h, d, d) second moments of the keys.
    """
    d = queries.shape[-1]
    factors = []
    for both in zip(queries, keys, strict=True):
        q, k = (moment / moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny) for moment in both)
        found = metric(k, outputs=q, input_shrinkage=SHRINKAGE, output_shrinkage=SHRINKAGE)
        factors.append(regress(torch.eye(d, dtype=torch.float64, device=q.device), found).factors(d))
    ranks = tuple(sorted({max(1, round(d * i / PARTS)) for i in range(1, PARTS + 1)}))
    up, down = (torch.stack([getattr(each, part) for each in factors]).float() for part in ("up", "down"))
    return Gated(up.contiguous(), down.contiguous(), ranks)


def _errors(
    model: PreTrainedModel, maps: Mapping[str, Gated], batches: Sequence[Tensor], divergences: bool, progress: Progress
) -> dict[str, LayerErrors]:
    gates = {name: RankGate(map_, FixedRank(len(map_.ranks) - 1)) for name, map_ in maps.items()}
    for gate in gates.values():
        gate.seen = []
        gate.to(model.device)
    found: dict[str, list[list[float]]] = {name: [] for name in gates}
    with watched(model, gates):
        for i, ids in enumerate(batches):
            progress("divergence" if divergences else "errors", i, len(batches))
            exact = _logits(model, ids)
            counts = {name: len(gate.seen or ()) for name, gate in gates.items()}
            if min(counts.values()) <= i:
                short = f"windows of {ids.shape[1]} tokens are too short for a rank to be worth choosing"
                raise EckartError(f"{short}; attention pays from a few times the head dimension on")
            for name, gate in gates.items() if divergences else ():
                found[name].append([_at(model, gate, r, ids, exact) for r in range(len(gate.ranks) - 1)] + [0.0])
            for name, gate in gates.items():
                gate.seen = (gate.seen or [])[: counts[name]]
    out = {}
    for name, gate in gates.items():
        errors = [torch.cat([getattr(e, part) for e in gate.seen or ()]).cpu() for part in ("bound", "scores")]
        out[name] = LayerErrors(maps[name], Errors(*errors), torch.tensor(found[name], dtype=torch.float64))
    return out


def _at(model: PreTrainedModel, gate: RankGate, index: int, ids: Tensor, exact: Tensor) -> float:
    """Return the divergence of the predictions, in nats per token, with one layer at one rank."""
    former, gate.policy = gate.policy, FixedRank(index)
    changed = _logits(model, ids)
    gate.policy = former
    return float((exact.exp() * (exact - changed)).sum(-1).mean(dtype=torch.float64))


def policies(policy: str, seen: Mapping[str, LayerErrors], rank: float) -> Mapping[str, Policy]:
    """Return a policy for every layer, of the largest mean rank found up to a share of the head dimension.

    Args:
        policy: one of `POLICIES`; "learned" needs divergences.
        seen: what `measured` returned.
        rank: in (0, 1].
    """
    ranks = {name: layer.map.ranks for name, layer in seen.items()}

    def fits(made: Mapping[str, Policy]) -> bool:
        chosen = [torch.tensor(own, dtype=torch.float64)[made[n](seen[n].errors)] / own[-1] for n, own in ranks.items()]
        return float(torch.cat(chosen).mean()) <= rank

    if policy == "fixed":
        return {name: FixedRank(max(sum(r <= rank * own[-1] for r in own) - 1, 0)) for name, own in ranks.items()}
    make: Callable[[float], Mapping[str, Policy]]
    if policy == "bound":

        def make(exponent: float) -> Mapping[str, Policy]:
            return {name: BoundedRank(10.0**exponent) for name in seen}

    else:
        scale = _scale(seen, ranks, rank)

        def make(exponent: float) -> Mapping[str, Policy]:
            return {name: _learned(each, ranks[name], scale, 10.0**exponent) for name, each in seen.items()}

    return _bisected(make, fits)


def _bisected(
    make: Callable[[float], Mapping[str, Policy]], fits: Callable[[Mapping[str, Policy]], bool]
) -> Mapping[str, Policy]:
    """Return the policies of the least exponent that fit; ranks fall as it grows, down to the least rank everywhere."""
    low, high = EXPONENTS
    found = make(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = make(middle)
        if fits(tried):
            high, found = middle, tried
        else:
            low = middle
    return found


def _scale(seen: Mapping[str, LayerErrors], ranks: Mapping[str, Sequence[int]], rank: float) -> float:
    """Return the mean divergence of a layer at the rank asked for, which makes a price comparable between models."""
    nearest = {name: min(range(len(own)), key=lambda i: abs(own[i] - rank * own[-1])) for name, own in ranks.items()}
    mean = sum(float(each.divergence[:, nearest[name]].mean()) for name, each in seen.items()) / len(seen)
    return max(mean, TINY)


def _learned(seen: LayerErrors, ranks: Sequence[int], scale: float, price: float) -> LearnedRank:
    """Return the policy of one layer, by gradient ascent on the expected reward."""
    features = seen.errors.features().double()
    centre, spread = features.mean(0), features.std(0, correction=0).clamp_min(1e-3)
    x = (features - centre) / spread
    shares = torch.tensor(ranks, dtype=torch.float64) / ranks[-1]
    reward = -seen.divergence / scale - price * shares
    reward = (reward - reward.mean()) / reward.std().clamp_min(TINY)
    weight, bias = (
        nn.Parameter(torch.zeros(*size, dtype=torch.float64)) for size in ((x.shape[1], len(ranks)), (len(ranks),))
    )
    optimizer = torch.optim.Adam([weight, bias], lr=RATE)
    for _ in range(STEPS):
        with torch.no_grad():
            chance = (x @ weight + bias).softmax(1)
            # the gradient of the expected reward by the logits: chance * (reward - expected reward)
            slope = chance * (reward - (chance * reward).sum(1, keepdim=True)) / len(x)
            weight.grad, bias.grad = DECAY * weight - x.mT @ slope, -slope.sum(0)
        optimizer.step()
    folded = weight.detach() / spread[:, None]
    return LearnedRank(folded.float(), (bias.detach() - centre @ folded).float())
