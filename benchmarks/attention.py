"""Adaptive-rank attention: loss against the mean rank of its three policies, and the time of one long attention call.

    python benchmarks/attention.py [--models stories3m ...] [--samples 16] [--time-only]

Ranks are calibrated on windows of the training split, as long as the model reads at most, and measured on windows of
the validation split. The loss is that of every token but a window's first. Times are of the attention function alone on
random queries and keys: exact, and at a fixed share of the head dimension with the errors that a policy would see.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from eckart.files.attention import adaptive_forward, install
from eckart.files.text import load_tokenizer, read_documents, windows
from eckart.hosts.attention import FixedRank, RankGate
from eckart.methods.attention import POLICIES, gated, measured, policies
from harness import load, medians, require_shared, save

MODELS = ("stories3m", "babyllama105")
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
# (heads, tokens, head dimension)
CALLS = ((8, 1024, 64), (8, 4096, 64), (4, 4096, 128))


@torch.no_grad()
def loss(model: PreTrainedModel, batches: list[Tensor]) -> float:
    """Return nats per token."""
    each = [F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:]).double() for ids in batches]
    return float(torch.stack(each).mean())


def batches_of(folder: Path, path: Path, length: int, samples: int) -> list[Tensor]:
    """Return windows of a text."""
    found = windows(load_tokenizer(folder), read_documents(path), samples=samples, length=length, batch=1, held_out=0)
    return found.batches


def quality(shared: Path, name: str, samples: int) -> list[dict[str, Any]]:
    """Return a row per policy and mean rank."""
    folder, texts = shared / "models" / name, shared / "data/tinystories"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = model.config.max_position_embeddings
    seen = measured(model, batches_of(folder, texts / "train.txt.gz", length, samples), divergences=True)
    held_out = batches_of(folder, texts / "valid.txt.gz", length, samples)
    dense, rows = loss(model, held_out), []
    for share in SHARES:
        for policy in POLICIES:
            made = policies(policy, seen, share)
            adapted = install(model, {n: RankGate(layer.map, made[n]) for n, layer in seen.items()})
            found, own = loss(model, held_out), [gate.total / gate.calls for gate in adapted.gates.values()]
            row = {
                "kind": "loss",
                "model": name,
                "length": length,
                "windows": samples,
                "policy": policy,
                "share": share,
            }
            row |= {"mean": adapted.mean_rank(), "layers": own, "loss": found, "dense loss": dense}
            adapted.remove()
            rows.append(row)
            print(row, flush=True)
    return rows


@torch.no_grad()
def times() -> list[dict[str, Any]]:
    """Return a row per size of a call: seconds of exact attention, and of adaptive attention over it at some ranks."""
    rows = []
    for heads, tokens, d in CALLS:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, heads, tokens, d, generator=generator) for _ in range(3))
        moment = torch.eye(d, dtype=torch.float64).expand(heads, d, d)
        map_ = gated(moment, moment)
        contenders, ranks = {"exact": nn.Module()}, {"quarter": d // 4, "half": d // 2}
        for name, rank in ranks.items():
            contenders[name] = nn.Module()
            contenders[name].add_module("eckart_rank", RankGate(map_, FixedRank(map_.ranks.index(rank))))
        for module in contenders.values():
            module.is_causal = True  # type: ignore[assignment]
        calls = {name: partial(adaptive_forward, each, q, k, v, None) for name, each in contenders.items()}
        found = medians(calls, runs=7)
        row = {"kind": "time", "heads": heads, "tokens": tokens, "dimension": d, "exact": found["exact"]}
        rows.append(row | {name: found[name] / found["exact"] for name in ranks})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--time-only", action="store_true", help="measure times alone")
    given = parser.parse_args()
    shared = require_shared()
    for name in () if given.time_only else given.models:
        rows = quality(shared, name, given.samples)
        save("attention", [r for r in load("attention")["rows"] if r.get("model") != name] + rows)
    rows = times()
    save("attention", [r for r in load("attention")["rows"] if r["kind"] != "time"] + rows)


if __name__ == "__main__":
    main()
