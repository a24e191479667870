"""Time and memory of one training step with adapters, beside the frozen model and PEFT's adapters, in one run.

    python benchmarks/adapters.py [--hidden 512 1024] [--methods dora hra ...] [--pairs 7]

A Llama of four blocks with random weights, every linear layer of its blocks adapted, 2 x 256 tokens forward and
backward. Times are processor time of one thread, each contender in turn with the frozen model, as medians of ratios;
memory is the peak of a process of its own above what it holds at rest, the allocator made to return what is freed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import eckart
from harness import load, save

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# By row: a method, and behind a comma what is special about it.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 16} for name in eckart.ADAPTERS},
    "sara": {},
    "lift": {"rank": 16, "budget": 16},
    "s2ft": {"channels": 16},
    "snella": {},
    "flylora": {},
    "spectralft": {},
    "flora": {"rank": 16},
    "tlora": {},
    "sparselora": {"rank": 16, "dense": 0, "outputs": "sparse"},
    "hra": {"rank": 8},
    "oft": {"block": 32},
    "svfit": {"rank": 64},
    "soka": {"rank": 1},
    "ia3": {},
    "loha, rank 8": {"rank": 8},
}


def model_of(hidden: int) -> nn.Module:
    """Return the model, frozen but for its embedding, so that gradients flow through every block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=4096, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def ids(count: int = 1) -> list[torch.Tensor]:
    """Return batches of 2 x 256 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 4096, (2, 256), generator=generator) for _ in range(count)]


def method_of(row: str) -> str:
    """Return the method that a row is of."""
    return row.partition(",")[0]


def peft_config(row: str) -> Any:
    """Return PEFT's configuration of the same adapter, or None where it has none."""
    import peft

    common: dict[str, Any] = {"target_modules": TARGETS}
    r = SETTINGS[row].get("rank", 16)
    lora = {**common, "r": r, "lora_alpha": 16}
    return {
        "lora": lambda: peft.LoraConfig(**lora),
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "pissa": lambda: peft.LoraConfig(**lora, init_lora_weights="pissa"),
        "olora": lambda: peft.LoraConfig(**lora, init_lora_weights="olora"),
        "miss": lambda: peft.MissConfig(**common, r=r),
        "hra": lambda: peft.HRAConfig(**common, r=r),
        "oft": lambda: peft.OFTConfig(**common, r=0, oft_block_size=32, use_cayley_neumann=False),
        "soka": lambda: peft.LoKrConfig(**common, r=r, alpha=r, decompose_both=False, rank_dropout=0.0),
        "lokr": lambda: peft.LoKrConfig(**common, r=r, alpha=r),
        "loha": lambda: peft.LoHaConfig(**common, r=r, alpha=r),
        "hira": lambda: peft.HiraConfig(**common, r=r),
        "vera": lambda: peft.VeraConfig(**common, r=r),
        "ia3": lambda: peft.IA3Config(**common, feedforward_modules=["down_proj"]),
    }.get(method_of(row), lambda: None)()


def contender(kind: str, row: str, hidden: int) -> nn.Module:
    """Return the model with nothing ("frozen"), eckart's or PEFT's adapter."""
    import peft

    model = model_of(hidden)
    if kind == "eckart":
        eckart.adapt(model, method_of(row), data=ids(4), **SETTINGS[row])
    elif kind == "peft":
        model = peft.get_peft_model(model, peft_config(row))
    # Gradients have to flow through the whole model in every contender alike.
    model.get_input_embeddings().weight.requires_grad_(True)
    return model.train()


def step(model: nn.Module, batch: torch.Tensor) -> None:
    """Run forward and backward once."""
    model(input_ids=batch, labels=batch).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def ratios(method: str, hidden: int, pairs: int) -> dict[str, Any]:
    """Return the processor time of a step over that of the frozen model, and trained parameters."""
    torch.set_num_threads(1)
    kinds = ["frozen", "eckart"] + (["peft"] if peft_config(method) is not None else [])
    models = {kind: contender(kind, method, hidden) for kind in kinds}
    embedding = models["frozen"].get_input_embeddings().weight.numel()
    batch, times = ids()[0], {kind: [] for kind in kinds}
    for run in range(pairs + 1):
        for kind in kinds:
            began = time.process_time()
            step(models[kind], batch)
            if run:
                times[kind].append(time.process_time() - began)
    out: dict[str, Any] = {}
    for kind in kinds[1:]:
        each = [a / b for a, b in zip(times[kind], times["frozen"], strict=True)]
        trained = sum(p.numel() for p in models[kind].parameters() if p.requires_grad) - embedding
        out[kind] = {"ratio": statistics.median(each), "trained": trained}
    return out


def peak(kind: str, method: str, hidden: int) -> int:
    """Return the bytes by which a step raises the resident memory of this process."""
    torch.set_num_threads(1)
    model, batch = contender(kind, method, hidden), ids()[0]
    step(model, batch)
    rest = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(model, batch)
    return resident("VmHWM") - rest


def resident(field: str) -> int:
    """Return a size of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def apart(task: str, *arguments: Any) -> Any:
    """Run a function of this file in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment = environment if task == "peak" else dict(os.environ)
    command = [sys.executable, __file__, "--task", json.dumps([task, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        name, *arguments = json.loads(given.task)
        tasks: dict[str, Callable[..., Any]] = {"ratios": ratios, "peak": peak}
        print(json.dumps(tasks[name](*arguments)))
        return
    for hidden in given.hidden:
        frozen = apart("peak", "frozen", "lora", hidden)
        for method in given.methods:
            row = {"hidden": hidden, "method": method, "settings": SETTINGS[method], "frozen peak": frozen}
            found = apart("ratios", method, hidden, given.pairs)
            for kind, values in found.items():
                row[kind] = values | {"peak": apart("peak", kind, method, hidden)}
            rows = [r for r in load("adapters")["rows"] if (r["hidden"], r["method"]) != (hidden, method)]
            save("adapters", [*rows, row])
            print(row, flush=True)


if __name__ == "__main__":
    main()
