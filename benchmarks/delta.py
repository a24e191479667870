"""A fine-tune stored as a difference: loss of what is restored, by size and bits, on the text tuned on and on the base's.

    python benchmarks/delta.py [--keep 0.1 ...] [--bits 8 ...] [--again]

stories3m is fine-tuned on Shakespeare's plays (the first nine tenths of tinyshakespeare) with AdamW in plain torch,
all weights, then stored beside the base. "plays" is the last tenth, "stories" the validation split of TinyStories,
which the base was made for.
"""

import gzip
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

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
