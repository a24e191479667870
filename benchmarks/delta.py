"""A fine-tune stored as a difference: the loss of what is restored, by size and bits, on two texts.

    python benchmarks/delta.py [--keep 0.1 ...] [--tuned DIR] [--again]

stories3m is fine-tuned on Shakespeare's plays (the first nine tenths of tinyshakespeare) with AdamW in plain torch,
all weights, then stored beside the base. "plays" is the last tenth, "stories" the validation split of TinyStories,
which the base was made for.
"""

import argparse
import gzip
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart
from harness import load, require_shared, save

Row = dict[str, Any]
STEPS, BATCH, LENGTH, RATE, WARM_UP = 400, 8, 128, 5e-4, 40


def windows(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Return a batch of random windows, (BATCH, LENGTH + 1)."""
    starts = torch.randint(0, ids.numel() - LENGTH - 1, (BATCH,), generator=generator)
    return torch.stack([ids[s : s + LENGTH + 1] for s in starts.tolist()])


def fine_tune(base: Path, text: str, out: Path) -> None:
    """Fine-tune all weights of a model on a text, and save it in the dtype of the base."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dtype = model.dtype
    model = model.float().train()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(STEPS):
        scale = min(1.0, (step + 1) / WARM_UP) * (1 - step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = RATE * scale
        batch = windows(ids, generator)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.to(dtype).eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


def measured(folder: Path, texts: dict[str, Path]) -> dict[str, float]:
    """Return the loss on every text, in nats per token."""
    return {name: float(eckart.evaluate(folder, text=path).nats_per_token or 0.0) for name, path in texts.items()}


def row(base: Path, tuned: Path, texts: dict[str, Path], text: Path | None, keep: float, bits: int | None) -> Row:
    """Store the difference, restore it twice, and measure what comes back."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, first, second = (Path(scratch) / name for name in ("delta", "first", "second"))
        made = eckart.delta(base, tuned, folder, keep=keep, bits=bits, calibration=text)
        exact = all(eckart.restore(base, folder, out).exact for out in (first, second))
        same = all((second / path.name).read_bytes() == path.read_bytes() for path in first.iterdir())
        predicted = made.after if text else None
        return {"share": made.share, "predicted": predicted, "exact": exact and same, **measured(first, texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.1, 0.05, 0.2])
    parser.add_argument("--tuned", type=Path, help="folder of the fine-tuned model; made if it is not there")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    given = parser.parse_args()
    shared = require_shared()
    base, rows = shared / "models/stories3m", [] if given.again else load("delta")["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        plays, stories = (
            gzip.decompress((shared / "data" / name).read_bytes()).decode()
            for name in ("tinyshakespeare/input.txt.gz", "tinystories/valid.txt.gz")
        )
        cut = int(0.9 * len(plays))
        train, texts = Path(scratch) / "train.txt", {name: Path(scratch) / name for name in ("plays", "stories")}
        for path, text in ((train, plays[:cut]), (texts["plays"], plays[cut:]), (texts["stories"], stories[:100_000])):
            path.write_text(text)
        tuned = given.tuned or Path(scratch) / "tuned"
        if not tuned.is_dir():
            fine_tune(base, plays[:cut], tuned)
        if not any(r["what"] == "tuned" for r in rows):
            rows += [{"what": what, **measured(folder, texts)} for what, folder in (("base", base), ("tuned", tuned))]
        for keep in given.keep:
            for text, bits in ((train, None), (train, 16), (train, 8), (train, 4), (None, None), (None, 8)):
                key = {"what": "restored", "keep": keep, "text": text is not None, "bits": bits or "mixed"}
                if any(key.items() <= r.items() for r in rows):
                    continue
                rows.append({**key, **row(base, tuned, texts, text, keep, bits)})
                print(rows[-1], flush=True)
                save("delta", rows)


if __name__ == "__main__":
    main()
