"""Elastic folders against direct compression: what the model still knows at each size, and what the folder weighs.

    python benchmarks/elastic.py [--models stories3m ...] [--keep 0.8 ...] [--again] [--folder DIR]

One folder is made per model, elastic from 0.9 to 0.5, and cut to every size; the rival is compressed to that size with
the same text. Calibration is on the training split, the loss on text A of benchmarks/compression.py.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import eckart
from compression import loss_on
from harness import load, require_shared, save

MODELS = ("stories3m", "stories260k")
LARGEST, LEAST = 0.9, 0.5
# The sizes that components are fitted at, and some halfway between them.
KEEP = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.725, 0.675, 0.525)


def bytes_of(folder: Path) -> int:
    """Return the bytes of all weights in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    parser.add_argument("--folder", type=Path, help="elastic folder of the one model, made before with the same text")
    given = parser.parse_args()
    shared = require_shared()
    text = shared / "data/tinystories/train.txt.gz"
    measure = loss_on(shared / "data/tinystories/valid.txt.gz", 100)
    for model in given.models:
        rows: list[dict[str, Any]] = load("elastic")["rows"]
        wanted = [k for k in given.keep if given.again or not any((r["model"], r["keep"]) == (model, k) for r in rows)]
        if not wanted:
            continue
        dense = shared / "models" / model
        with tempfile.TemporaryDirectory() as scratch:
            folder = given.folder or Path(scratch) / "elastic"
            if given.folder is None:
                eckart.compress(dense, folder, keep=LARGEST, calibration=text, elastic=True, least=LEAST)
            sizes = {"elastic bytes": bytes_of(folder), "dense bytes": bytes_of(dense), "dense loss": measure(dense)}
            for keep in wanted:
                cut, direct = Path(scratch) / f"cut-{keep}", Path(scratch) / f"direct-{keep}"
                eckart.slice_folder(folder, cut, keep=keep)
                eckart.compress(dense, direct, keep=keep, calibration=text)
                row = {"model": model, "keep": keep, "cut": measure(cut), "direct": measure(direct)}
                row |= {"cut bytes": bytes_of(cut), "direct bytes": bytes_of(direct), **sizes}
                rows = [r for r in load("elastic")["rows"] if (r["model"], r["keep"]) != (model, keep)] + [row]
                save("elastic", rows)
                print(row, flush=True)


if __name__ == "__main__":
    main()
