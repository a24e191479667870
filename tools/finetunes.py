"""Arranges the fine-tunes of benchmarks/finetunes.py: a table per task, and what papers claim beside what was found."""

import statistics
from collections.abc import Sequence
from typing import Any

# Title, measure and short name of every task.
TASKS = {
    "plays": ("stories3m learns Shakespeare", "loss", "Shakespeare, nats"),
    "trec": ("all-MiniLM-L6-v2 learns kinds of questions (TREC)", "accuracy", "TREC, points"),
    "sst2": ("all-MiniLM-L6-v2 learns sentiment (SST-2)", "accuracy", "SST-2, points"),
}
BASELINES = ("nothing", "full")
# Method, what its paper says it is better than, where.
CLAIMS = (
    ("rslora", "lora", "the scale alpha / sqrt(r) learns better at high ranks"),
    ("lora+", "lora", "a larger rate for B: better by 1-2 % and up to twice as fast"),
    ("dora", "lora", "better on commonsense reasoning at equal rank"),
    ("pissa", "lora", "GSM8K with Mistral-7B: 72.9 against 67.7"),
    ("olora", "lora", "converges faster"),
    ("corda", "pissa", "instruction mode: better than PiSSA on maths and code"),
    ("eva", "lora", "fastest convergence and best average in four domains"),
    ("lora-xs", "lora", "comparable with a hundredth of the parameters"),
    ("lora-sb", "lora", "better with 27-90 times fewer parameters"),
    ("lora-sb", "lora-xs", "better at the same number of parameters"),
    ("lora-pro", "lora", "nearer to full fine-tuning"),
    ("allora", "lora", "better without dropout and scale"),
    ("svfit", "lora", "better with 16 times fewer parameters"),
    ("sorsa", "pissa", "better on GSM8K and MATH"),
    ("soka", "pissa", "equal or better with a quarter fewer parameters"),
    ("miss", "lora", "better, faster and in less memory"),
    ("hra", "oft", "better than OFT and LoRA with fewer parameters"),
    ("lift", "full", "better than full fine-tuning on reasoning"),
    ("s2ft", "lora", "better by 4.6 % on commonsense, 1.3 % on arithmetic"),
    ("snella", "lora", "better than low-rank methods on images"),
    ("flylora", "lora", "better at the same active parameters"),
    ("spectralft", "lora", "better than changes of all directions"),
    ("flora", "lora", "better at the same number of parameters"),
    ("hira", "lora", "better on commonsense reasoning, being of high rank"),
    ("vera", "lora", "as good with ten times fewer parameters"),
    ("sparselora", "lora", "as good at up to 2.2 times fewer operations"),
)


def finetunes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a table per task: a line per method, the best first, baselines on top."""
    out = []
    for task, (title, measure, short) in TASKS.items():
        mine = [row for row in rows if row["task"] == task and "error" not in row]
        if not mine:
            continue
        lines = [_line(row, measure) for row in mine]
        sign = -1 if measure == "accuracy" else 1
        lines.sort(key=lambda line: (line["method"] not in BASELINES, sign * line["mean"]))
        out.append({"title": title, "short": short, "measure": measure, "lines": lines, "bests": _bests(lines, sign)})
    return out


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what papers claim with the difference found on every task, and whether it is beyond the seeds' spread."""
    at = {(row["task"], row["method"]): row for row in rows if "error" not in row}
    out = []
    measured = [task for task in TASKS if any(key[0] == task for key in at)]
    for method, rival, text in CLAIMS:
        found = [_difference(at.get((task, method)), at.get((task, rival)), TASKS[task][1]) for task in measured]
        if any(found):
            out.append({"method": method, "rival": rival, "claim": text, "found": found})
    return out


def _line(row: dict[str, Any], measure: str) -> dict[str, Any]:
    values = [seed[measure] for seed in row["seeds"] if measure in seed]
    seconds = statistics.median(seed["seconds"] for seed in row["seeds"] if "seconds" in seed)
    edge = len(row["rates"]) > 1 and row["rate"] in (min(map(float, row["rates"])), max(map(float, row["rates"])))
    return {
        "method": row["method"],
        "trained": row["trained"],
        "rate": row["rate"],
        "edge": edge,
        "mean": statistics.mean(values),
        "spread": max(values) - min(values),
        "seconds": seconds / row["full seconds"],
        "bytes": row["bytes"],
    }


def _bests(lines: Sequence[dict[str, Any]], sign: int) -> list[str]:
    """Return the methods whose mean is best among those that are not baselines."""
    adapted = [line for line in lines if line["method"] not in BASELINES]
    best = min((sign * line["mean"] for line in adapted), default=0.0)
    return [line["method"] for line in adapted if sign * line["mean"] == best]


def _difference(mine: dict[str, Any] | None, other: dict[str, Any] | None, measure: str) -> str | None:
    """Return how much better a method is than its rival, with a verdict where the ranges of seeds do not overlap."""
    if mine is None or other is None:
        return None
    ours, theirs = ([seed[measure] for seed in row["seeds"] if measure in seed] for row in (mine, other))
    sign = 1 if measure == "accuracy" else -1
    better = sign * (statistics.mean(ours) - statistics.mean(theirs))
    overlap = min(max(ours), max(theirs)) >= max(min(ours), min(theirs))
    text = f"{100 * better:+.1f}" if measure == "accuracy" else f"{better:+.3f}"
    return text if overlap else f"{text} ({'yes' if better > 0 else 'no'})"
