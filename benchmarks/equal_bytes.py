"""Loss at equal bytes: quantizers, structure with its numbers quantized, rows of several widths; one small real model.

    python benchmarks/equal_bytes.py [--variants "eckart int8" ...] [--again]

Token embedding and tied head take part in every row. Bits per weight are those of the whole file over the parameters of
the original, scales, zero points, tables, permutations and norms included. Rows that are there already are skipped.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import eckart
from compression import Subject, subjects
from eckart.files.inspect import show
from harness import load, require_shared, save

MODEL, PARAMETERS = "stories3m", 3_148_224
QUANTIZERS = {
    f"{method} int{bits} g{group}": (method, {}, {"bits": bits, "group_size": group})
    for method in ("rtn", "gptq", "any4")
    for bits in (4, 3)
    for group in (64, 128)
}
# Keep is chosen so that the bytes of these rows are near 4.5, 4, 3.5 and 3 bits per weight.
STRUCTURES = {
    f"{method} int{bits} keep {keep:g}": (method, {"keep": keep}, {"bits": bits})
    for method, bits, keeps in (
        ("eckart", 8, (0.52, 0.46, 0.4, 0.34)),
        ("eckart", 4, (1.0, 0.9, 0.8, 0.7)),
        ("eckart-mixed", 8, (0.46, 0.34)),
    )
    for keep in keeps
}
COMBINED = {
    f"gptq int{bits} g128, clipped": ("gptq", {}, {"bits": bits, "group_size": 128, "clip": True}) for bits in (4, 3)
}
NARROW = {
    f"{method} int{bits} keep 0.8": (method, {"keep": 0.8}, {"bits": bits, **settings})
    for method, settings in (("modegpt", {}), ("slicegpt", {"untie": True}))
    for bits in (8, 4)
}
# Bits per number of the original: one between the others, and as many as int3 and int4 with groups of 128 take.
WIDTHS = {
    f"eckart-mixed {bits:g} bits": ("eckart-mixed", {"bytes": int(bits * PARAMETERS / 8)}, {})
    for bits in (4.29, 3.5, 3.29, 3.0)
}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **QUANTIZERS,
    **COMBINED,
    **STRUCTURES,
    **NARROW,
    **WIDTHS,
}


def row_of(subject: Subject, variant: str, scratch: Path) -> dict[str, Any]:
    """Compress, reload and measure."""
    method, budget, settings = VARIANTS[variant]
    settings = {**settings, "embeddings": True}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "out"
        outcome = eckart.compress(
            subject.folder, out, method=method, calibration=subject.calibration, settings=settings, **budget
        )
        return {
            "model": MODEL,
            "variant": variant,
            "method": method,
            "kept": outcome.plan.kept,
            "bytes": outcome.plan.bytes_after,
            "bits": 8 * show(out).nbytes / outcome.plan.parameters_before,
            **{name: measure(out) for name, measure in subject.measures.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        subject = subjects(require_shared(), scratch)[MODEL]
        rows = load("equal_bytes")["rows"]
        if not rows:
            contents = show(subject.folder)
            sizes = {"kept": 1.0, "bytes": contents.nbytes, "bits": 8 * contents.nbytes / contents.parameters}
            measured = {name: measure(subject.folder) for name, measure in subject.measures.items()}
            rows = [{"model": MODEL, "variant": "dense", "method": "dense", **sizes, **measured}]
            save("equal_bytes", rows)
        for variant in given.variants:
            if not given.again and any(row["variant"] == variant for row in rows):
                continue
            row = row_of(subject, variant, scratch)
            # Read anew: another process may be measuring other rows.
            rows = [r for r in load("equal_bytes")["rows"] if r["variant"] != variant] + [row]
            save("equal_bytes", rows)
            print(row, flush=True)


if __name__ == "__main__":
    main()
