"""What papers on compression claim, beside what the rows of benchmarks/compression.py say."""

from collections.abc import Sequence
from typing import Any

KEEPS = (0.8, 0.6, 0.5)
# Row, what its paper says it is better than, the claim, and why it is so here as far as is known (docs/LOG.md).
CLAIMS = (
    ("fwsvd", "svd", "rows weighed by Fisher information beat plain SVD", ""),
    ("asvd", "svd", "scaled inputs and searched ranks beat plain SVD", ""),
    ("afm", "svd", "PCA of a layer's outputs beats SVD of its weight", ""),
    ("svd-llm", "asvd", "whitened truncation beats scaled SVD", ""),
    (
        "svd-llm-v2", "svd-llm", "ranks by each layer's truncation loss beat uniform ones",
        "shares by 1 / log of the loss are nearly uniform: 1 % better than uniform ones on the same truncation, "
        "less than the update of the first version gives",
    ),
    (
        "kfac", "svd-llm", "a metric of outputs beside that of inputs",
        "its rival refits what follows a compressed part; without that it is behind at every budget",
    ),
    ("aa-svd", "svd-llm", "anchoring to what the compressed part before sees", ""),
    (
        "basis-sharing", "svd-llm", "a basis shared by adjacent layers beats one for each",
        "the common moment of the layers' inputs costs more than sharing saves; the next row is without it",
    ),
    ("basis-sharing, own metrics", "svd-llm", "the same, every layer under its own inputs (ours)", ""),
    ("concatenated-svd", "basis-sharing", "clusters by bounds on the error beat adjacent pairs", ""),
    (
        "cospadi", "svd-llm", "dictionaries with sparse codes beat low rank at 20-50 % removed",
        "positions cost 2 to 3 bits per non-zero",
    ),
    ("compot", "cospadi", "orthogonal dictionaries: as good, in closed form", ""),
    ("rocket", "cospadi", "codes in the eigenbasis, sizes by a knapsack: as good, faster", ""),
    (
        "dobi-svd", "svd-llm", "learned truncation of activations beats fixed truncation of weights",
        "20 steps of two windows; its update weighs every direction of a sequence alike, however little of the output "
        "lies in it; the next row is without it",
    ),
    ("dobi-svd, by tokens", "dobi-svd", "the same with PCA of all outputs (ours)", ""),
    ("acip trained", "svd-llm", "masks on singular values, learned in one descent", ""),
    (
        "acip trained, factors", "svd-llm trained", "the same, both trained on as many windows",
        "masks choose among plain singular values, and all close at nearly one speed",
    ),
    (
        "acip trained, factors of the outputs", "svd-llm trained", "the same, singular values under the inputs (ours)",
        "",
    ),
    (
        "zs-svd", "svd-llm", "zero-sum choice of singular values by first-order changes",
        "first-order predictions do not hold far; corrections cost where little is broken",
    ),
    ("zs-svd, no corrections", "svd-llm", "the same without corrections", "first-order predictions do not hold far"),
    ("oats", "svd-llm", "sparse plus low rank beats low rank", ""),
    (
        "slicegpt", "svd-llm", "slicing in the principal directions",
        "it slices the embedding as well, which low rank leaves alone",
    ),
    (
        "modegpt", "slicegpt", "decomposition by modules beats slicing",
        "its softmax over blocks leaves the later of six blocks next to nothing at 0.5",
    ),
    (
        "modegpt", "svd-llm", "the same against low rank",
        "its softmax over blocks leaves the later of six blocks next to nothing at 0.5",
    ),
    ("fusegpt trained", "fusegpt, no fusion", "fusing removed blocks into neighbours beats plain removal", ""),
    ("fusegpt, no fusion", "shortgpt", "macro influence beats block influence", ""),
    ("trp trained", "svd-llm trained", "truncation inside training beats truncation before it", "150 steps only"),
    (
        "pela trained", "svd-llm trained", "distilled features and perturbed weights beat plain tuning",
        "it starts from plain SVD, its rival from truncation under the inputs",
    ),
    (
        "maestro trained", "svd-llm trained", "ordered dropout and group lasso choose ranks",
        "150 steps only; where a model is linear it recovers SVD and PCA exactly (tests)",
    ),
    ("eckart", "svd-llm, eckart's structure", "metric of both sides, allocation and anchor (ours) over uniform", ""),
    ("eckart-mixed", "eckart", "one knapsack over structures beats the best single one (ours)", ""),
)  # fmt: skip


UNKNOWN = "not known"
# Where the claims are looked at: model and what is lower if one holds.
MEASURES = (("stories3m", "loss A"), ("all-MiniLM-L6-v2", "distance"))


def compression_claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each claim with by how much each measure is lower at the budgets, and whether it holds for all of them."""
    out = []
    for method, rival, text, why in CLAIMS:
        found, held = [], []
        for model, measure in MEASURES:
            of = {(r["variant"], r["keep"]): r[measure] for r in rows if r["model"] == model and measure in r}
            gains = [of[rival, k] - of[method, k] if {(rival, k), (method, k)} <= of.keys() else None for k in KEEPS]
            found.append(gains)
            held += [gain > 0 for gain in gains if gain is not None]
        if not held:
            continue
        verdict = "yes" if all(held) else "in part" if any(held) else "no"
        why = why or ("" if all(held) else UNKNOWN)
        out.append({"method": method, "rival": rival, "claim": text, "verdict": verdict, "found": found, "why": why})
    return out
