"""MoDeGPT: modular decomposition; here its first module, the MLP, which becomes smaller dense layers.

    S: the k units of largest  diag( C (C + lambda I)^-1 ),    C = E[h h^T], h the hidden units of the MLP
    gate and up keep the rows S,    W_down' = W_down C_(:,S) C_(S,S)^-1
    share removed of block b:  B R softmax(-BI / epsilon)_b,    BI_b = 1 - E cos(x_b, x_(b+1))

Deviations from the paper. Its second and third modules shrink heads: pairs of rotary channels of queries and keys, an
SVD of values and output per head. A plain transformers class reshapes by one head size and rotates all its channels, so
here the attention's matrices become low-rank maps, each under the second moment of its input, at the share of their
block. lambda is given over the mean square of the units. Shares are cut off where nothing is left and R rises until the
budget is met. An MLP whose units cannot be found (gate and up in one matrix) gets low-rank maps as well.

The narrow layers are `nn.Linear` modules: nothing is multiplied twice, nothing gathered, at run time.

Structure: fewer hidden units; low rank for attention. Metric: input second moment. Budget: shares by the influence of
blocks. Solver: ridge leverage scores, least squares. Trained: nothing.

Source: Lin et al. 2024, "MoDeGPT: Modular decomposition for large language model compression", Algorithm 1 and section
3.3. There is no official code; that epsilon is 0.1 by default could not be checked.
"""

from eckart.methods.compress.recipe import Recipe, input_moment


def modegpt(*, temperature: float = 0.1, ridge: float = 1.0) -> Recipe:
    """Fewer hidden units by ridge leverage, the layer behind them refitted; shares by the influence of blocks.

    Args:
        temperature: of the softmax over the influence of blocks; the larger, the more even the shares.
        ridge: of the leverage scores, over the mean square of the units.
    """
    return Recipe(
        metric=input_moment,
        allocation="influence",
        neurons=True,
        uses_inputs=True,
        temperature=temperature,
        ridge=ridge,
    )
