"""MoDeGPT: modular decomposition; the matrices of a module become smaller together.

    MLP: S the k units of largest  diag( C (C + lambda I)^-1 ),    C = E[h h^T], h the hidden units
         gate and up keep the rows S,    W_down' = W_down C_(:,S) C_(S,S)^-1
    Queries and keys: per head, the channels of largest  |C_q^1/2 (:,i)| |C_k^1/2 (:,i)|,  in pairs where positions
         rotate pairs; summed over the heads of queries that share a head of keys
    Values and output: per head, the best  W_O' W_V'  of rank r for  W_O W_V  under the moment of the input; heads of
         queries that share their values are fitted together
    share removed of block b:  B R softmax(-BI / epsilon)_b,    BI_b = 1 - E cos(x_b, x_(b+1))

Fewer hidden units are narrow `nn.Linear` modules: nothing is multiplied twice, nothing gathered, at run time. A class
of transformers reshapes by one head size and rotates all channels of a head, so the layers around heads keep their
outer sizes: they store and multiply the paper's narrow matrices, and place their rows among zeros. The parameters and
the operations of the projections are the paper's; attention itself, and the cache of keys and values, cost as before.

Deviations from the paper. lambda is given over the mean square of the units. Shares are cut off where nothing is left
and R rises until the budget is met. Layers around units or heads that cannot be found become low-rank maps, each under
the second moment of its input: gate and up in one matrix, norms of single queries and keys, half of a head rotated in
pairs from its two halves.

Structure: fewer hidden units, fewer channels per head. Metric: input second moment. Budget: shares by the influence of
blocks. Solver: ridge leverage scores and least squares; column selection; an SVD per head. Trained: nothing.

Source: Lin et al. 2024, "MoDeGPT: Modular decomposition for large language model compression", Algorithms 1 to 3 and
section 3.3. There is no official code; that epsilon is 0.1 by default could not be checked.
"""

from eckart.methods.compress.recipe import Recipe, input_moment


def modegpt(*, temperature: float = 0.1, ridge: float = 1.0, heads: bool = True) -> Recipe:
    """Fewer hidden units, fewer channels per attention head; shares by the influence of blocks.

    Args:
        temperature: of the softmax over the influence of blocks; the larger, the more even the shares.
        ridge: of the leverage scores, over the mean square of the units.
        heads: whether attention gets fewer channels per head; else low-rank maps.
    """
    return Recipe(
        metric=input_moment,
        allocation="influence",
        neurons=True,
        heads=heads,
        uses_inputs=True,
        temperature=temperature,
        ridge=ridge,
    )
