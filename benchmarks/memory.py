"""Peak memory of compressing a Llama of 300 million random weights, against the size of the model and of one block.

    python benchmarks/memory.py [--methods svd-llm eckart] [--blocks 23]

Every method runs in a process of its own; the peak is its largest resident memory, beside that of importing only.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harness import compress_apart, load, require_shared, save

BLOCKS = 23
IMPORT = "import torch, transformers, accelerate, eckart.methods.compress"
BASE = IMPORT + "\nfrom eckart.hosts.memory import peak_memory; print(peak_memory())"


def make(folder: Path, tokenizer: Path, blocks: int) -> dict[str, int]:
    """Save the model, in shards; return its sizes in bytes as run (float32)."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=blocks,
        num_attention_heads=16, num_key_value_heads=16,
        vocab_size=4096, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(folder, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    return {"parameters": sum(p.numel() for p in model.parameters()), "block_bytes": block}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["svd-llm", "eckart"])
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="any other number is printed, not saved")
    given = parser.parse_args()
    shared = require_shared()
    base = int(subprocess.run([sys.executable, "-c", BASE], check=True, capture_output=True, text=True).stdout)
    rows: list[dict[str, Any]] = load("memory")["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        sizes = make(folder, shared / "models/stories3m", given.blocks)
        for method in given.methods:
            text = shared / "data/tinystories/train.txt.gz"
            done = compress_apart(
                folder,
                Path(scratch) / method,
                method=method,
                keep=0.6,
                calibration=text,
                samples=32,
                length=256,
                cache=False,
            )
            row = {"method": method, **sizes, "import": base}
            row |= {"peak": done["peak_memory"], "seconds": done["seconds"], "kept": done["plan"]["kept"]}
            rows = [r for r in rows if r["method"] != method] + [row]
            print(row, flush=True)
            if given.blocks == BLOCKS:
                save("memory", rows)


if __name__ == "__main__":
    main()
