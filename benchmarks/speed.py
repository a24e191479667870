"""Speed of compressed layers and models against dense ones on this machine, in one run.

    python benchmarks/speed.py [--runs 9] [--models stories3m ...] [--no-layers]

Layers: one token and 256 tokens through a dense `nn.Linear`, a hand-written pair of `nn.Linear`, and eckart's hosts at
equal numbers. Models: tokens per second of `generate` at batch 1, dense and compressed, and of reading a long text.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eckart
from eckart.files.folder import quiet
from eckart.maps import LowRank, storage
from harness import load, medians, require_shared, save

SHAPES = ((192, 192), (512, 192), (1024, 1024), (4096, 1024))
KEEP = (0.8, 0.6, 0.4)
NEW_TOKENS = 64
LARGER = "Llama, 4 blocks of 1024, random"


def layer_rows(runs: int) -> list[dict[str, Any]]:
    """Time single layers."""
    rows = []
    for m, n in SHAPES:
        for keep in KEEP:
            dense = nn.Linear(n, m, bias=False).requires_grad_(False)
            ranks = {name: storage(name).largest_rank((m, n), keep * m * n) for name in ("lowrank", "pivoted")}
            hosts = {
                name: eckart.host(storage(name).build(LowRank(torch.randn(m, k), torch.randn(k, n)))).requires_grad_(
                    False
                )
                for name, k in ranks.items()
            }
            pair = nn.Sequential(
                nn.Linear(n, ranks["lowrank"], bias=False), nn.Linear(ranks["lowrank"], m, bias=False)
            ).requires_grad_(False)
            for tokens in (1, 256):
                x = torch.randn(1, tokens, n)
                modules = {"dense": dense, "two nn.Linear": pair, **hosts}
                repeat = max(10, int(2e8 / (m * n * tokens)))

                def run(module: nn.Module, x: torch.Tensor = x, repeat: int = repeat) -> None:
                    with torch.no_grad():
                        for _ in range(repeat):
                            module(x)

                times = medians({name: lambda f=f: run(f) for name, f in modules.items()}, runs=runs)
                micro = {name: seconds / repeat * 1e6 for name, seconds in times.items()}
                ratio = {name: value / micro["dense"] for name, value in micro.items()}
                rows.append(
                    {"shape": f"{m}x{n}", "keep": keep, "tokens": tokens, "microseconds": micro, "ratio": ratio}
                )
                print(rows[-1], flush=True)
    return rows


def make_larger(folder: Path, tokenizer: Path) -> None:
    """Save a model of random weights whose layers are as wide as those of small deployed models."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=4096, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def model_rows(name: str, runs: int) -> list[dict[str, Any]]:
    """Time a whole model."""
    shared, rows = require_shared(), []
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = Path(scratch) / "larger" if name == LARGER else shared / "models" / name
        if name == LARGER:
            make_larger(folder, shared / "models/stories3m")
        models = {"dense": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)}
        for method, keep in (("svd-llm", 0.6), ("eckart", 0.8), ("eckart", 0.6)):
            out = Path(scratch) / f"{name.partition(',')[0]}-{method}-{keep}"
            text, few = shared / "data/tinystories/train.txt.gz", 16 if name == LARGER else None
            eckart.compress(folder, out, method=method, keep=keep, calibration=text, samples=few)
            models[f"{method} {keep}"] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        start = torch.tensor([[1, *range(5, 12)]])
        reading = torch.randint(3, 100, (1, 256), generator=torch.Generator().manual_seed(0))

        def generate(model: nn.Module, start: torch.Tensor = start) -> None:
            model.generate(start, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)

        def read(model: nn.Module, reading: torch.Tensor = reading) -> None:
            with torch.no_grad():
                model(reading, use_cache=False)

        for task, function in (("generate", generate), ("read", read)):
            times = medians({key: lambda m=m, f=function: f(m) for key, m in models.items()}, runs=runs, warm_up=2)
            per_token = NEW_TOKENS if task == "generate" else reading.shape[1]
            rate = {key: per_token / seconds for key, seconds in times.items()}
            ratio = {key: times["dense"] / seconds for key, seconds in times.items()}
            rows.append({"model": name, "task": task, "tokens per second": rate, "speed-up": ratio})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--models", nargs="*", default=["stories3m", "babyllama105", LARGER])
    parser.add_argument("--layers", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    rows = load("speed")["rows"]
    for name in given.models:
        rows = [r for r in rows if r.get("model") != name] + model_rows(name, given.runs)
        save("speed", rows)
    if given.layers:
        save("speed", [r for r in rows if "shape" not in r] + layer_rows(given.runs))


if __name__ == "__main__":
    main()
