"""What benchmarks here share: interleaved timing, compression in a process of its own, the machine, results as JSON."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SHARED = Path(os.environ.get("ECKART_SHARED", ROOT.parent / "shared"))

# The peak of a process never sinks: one for every run, so that each has its own.
_COMPRESS = """
import json, os, sys
import eckart, eckart.methods.compress.pipeline
model, out, options = sys.argv[1:]
began = os.times()
try:
    answer = eckart.compress(model, out, **json.loads(options)).as_dict()
except eckart.EckartError as error:
    answer = {"error": str(error)}
print(json.dumps(answer | {"processor_seconds": sum(os.times()[:4]) - sum(began[:4])}))
"""


def compress_apart(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Compress in a new process; return the outcome, or {"error": the sentence} of a refusal.

    Besides, "processor_seconds" is what all its threads, and the process that checks the folder, computed together:
    with one thread the wall time on a machine that does nothing else, and hardly more on one that does.
    """
    command = [sys.executable, "-c", _COMPRESS, str(model), str(out), json.dumps(options, default=str)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"compressing {model} by {options.get('method')} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def medians(contenders: Mapping[str, Callable[[], Any]], *, runs: int = 5, warm_up: int = 1) -> dict[str, float]:
    """Time functions side by side, one run of each in turn, and return each one's median in seconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(warm_up + runs):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            if run >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    """Return what the figures depend on, in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def load(name: str) -> dict[str, Any]:
    """Return earlier results of a benchmark, or an empty record."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def save(name: str, rows: list[dict[str, Any]]) -> None:
    """Write results as JSON; rows that are new say on what machine and when they were measured."""
    RESULTS.mkdir(exist_ok=True)
    stamp = {"machine": machine(), "date": datetime.date.today().isoformat()}
    stamped = [row if "machine" in row else {**row, **stamp} for row in rows]
    temporary = RESULTS / f"{name}.json.tmp"
    temporary.write_text(json.dumps({"rows": stamped}, indent=1) + "\n")
    temporary.replace(RESULTS / f"{name}.json")


def require_shared() -> Path:
    """Return the folder with models and data sets, or stop with a sentence."""
    if not (SHARED / "models").is_dir():
        sys.exit(f"there is no {SHARED}/models; set ECKART_SHARED to the folder that holds models/ and data/")
    return SHARED
