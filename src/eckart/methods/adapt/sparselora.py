"""SparseLoRA: LoRA whose frozen layers compute only the channels that matter to each batch of training.

    W' = W + (alpha / r) B A        W x ~ E_c W_c x: rows c of the layers that write channels, columns of the one behind

    hidden units: c the largest |silu(gate) * up|_j    scores: |q_j| |k_j|    values: |v_j|, lengths over all tokens

The lengths are those of a frozen approximation of rank 8 of each layer, so a batch decides before it is multiplied.
Forward and backward leave the same channels out of W; B A has all of them. model.eval() computes all of W, always,
and so do the merged layers.

The first passes of training are dense: the paper's 5 % of the steps are a number here, counted in backward, since an
adapter does not know how long it will train. Tokens that the loss is taken at stay dense, as far as the model is called
with `labels` that leave some out (-100): on plain text, where every token is labelled, nothing is skipped. Queries that
share a key choose together.

Structure: low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Khaki et al. 2025, "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", and its published code;
the shares are those of its Llama-3-8B on Math10K: 99 % of the units of 28 MLPs, 75 % of 14 attentions, of 32.
"""

from typing import Literal

from eckart.hosts import Adapter
from eckart.methods.adapt.recipe import Recipe, added, check_rank
from eckart.methods.adapt.skipping import Skipping


def sparselora(
    *,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.0,
    predictor: int = 8,
    units: float = 0.99,
    heads: float = 0.75,
    units_from: float = 0.1,
    heads_from: float = 0.44,
    until: float = 0.97,
    dense: int = 25,
    outputs: Literal["dense", "sparse"] = "dense",
) -> Recipe:
    """LoRA whose frozen layers compute only the channels that matter to each batch of training.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
        dropout: share of the inputs of the low-rank map that is dropped in training.
        predictor: rank of the approximations that channels are chosen by.
        units: share of the hidden units of an MLP that is skipped; 0 for none.
        heads: share of the channels of queries, keys and values that is skipped; 0 for none.
        units_from: share of the MLPs, from the first one on, that skip nothing.
        heads_from: the same of the attentions.
        until: MLPs and attentions behind this share of them skip nothing.
        dense: passes of training, forward and backward, that skip nothing at first; 5 % of 500 steps.
        outputs: whether tokens that the loss is taken at compute all channels ("dense") or skip some too ("sparse"),
            which costs quality, since evaluation skips none.
    """
    check_rank(rank)
    check_rank(predictor)
    skipping = Skipping(predictor, units, heads, units_from, heads_from, until, dense, outputs == "sparse")
    return Recipe(
        lambda layer: Adapter([added(layer, rank, alpha / rank, dropout=dropout)]), rate=1e-3, skipping=skipping
    )
