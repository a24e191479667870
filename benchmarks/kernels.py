"""Time and memory of a DoRA layer on a GPU: eckart's Triton kernels, the same in torch's operations, and PEFT's layer.

    python benchmarks/kernels.py [--sizes 4096x4096 11008x4096] [--ranks 16 64 384] [--tokens 4096] [--runs 20]

Forward and backward of one layer in bfloat16, medians in one run, each contender in turn. Without a GPU it says so.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

import eckart
from eckart.kernels import rescaled_kernels
from eckart.linalg import rescaled
from harness import load, save


class Single(nn.Module):
    """One layer by a name."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n, m, bias=False, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def contenders(m: int, n: int, rank: int) -> dict[str, nn.Module]:
    import peft

    torch.manual_seed(0)
    plain = Single(m, n)
    weight = plain.layer.weight.detach().clone()
    ours = eckart.adapt(plain, "dora", targets=["layer"], rank=rank, alpha=rank)
    other = Single(m, n)
    other.layer.weight.data.copy_(weight)
    config = peft.LoraConfig(target_modules=["layer"], r=rank, lora_alpha=rank, use_dora=True)
    return {"kernels": ours, "torch": ours, "peft": peft.get_peft_model(other, config)}


def timed(step: Callable[[], Any]) -> tuple[float, int]:
    """Return milliseconds of a step, and the bytes by which it raises what is allocated."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), torch.cuda.max_memory_allocated() - held


def measure(m: int, n: int, rank: int, tokens: int, runs: int) -> dict[str, Any]:
    modules = contenders(m, n, rank)
    x = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    seed = torch.randn(tokens, m, device="cuda", dtype=torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in modules}
    peaks: dict[str, int] = {}

    def step(module: nn.Module) -> None:
        module(x).backward(seed)
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None

    for run in range(runs + 3):
        for name, module in modules.items():
            instead = (lambda tensor: None) if name == "torch" else rescaled_kernels
            with mock.patch.object(rescaled, "rescaled_kernels", instead):
                milliseconds, peaks[name] = timed(lambda module=module: step(module))
            if run >= 3:
                times[name].append(milliseconds)
    row = {"shape": f"{m}x{n}", "rank": rank, "tokens": tokens, "device": torch.cuda.get_device_name()}
    return row | {
        name: {"milliseconds": statistics.median(values), "peak": peaks[name]} for name, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64, 384])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=20)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here, and this measures nothing else")
        return
    for size in given.sizes:
        m, n = map(int, size.split("x"))
        for rank in given.ranks:
            row = measure(m, n, rank, given.tokens, given.runs)
            key = (row["shape"], rank, given.tokens)
            rows = [r for r in load("kernels")["rows"] if (r["shape"], r["rank"], r["tokens"]) != key]
            save("kernels", [*rows, row])
            print(row, flush=True)


if __name__ == "__main__":
    main()
