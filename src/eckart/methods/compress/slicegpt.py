"""SliceGPT: the residual stream on its principal axes, the least of them deleted; the result is a plain smaller model.

    C = sum over norms of E[z z^T],  z = x sqrt(d) / |x|,    Q = the d' leading eigenvectors of C
    what reads the stream:  W diag(g) Q,    what writes to it:  Q^T W,    every norm:  sqrt(d / d')

RMSNorm does not see a rotation once its weight g is in the layers behind it; with d' coordinates of about the same
length its result shrinks by sqrt(d' / d), which its new weight undoes.

Deviation from the paper: one Q for the whole model. The paper has one per block, and a matrix Q_(l-1)^T Q_l on every
skip connection, which a model class of transformers has no place for. So these matrices are identities here, and the
folder is loaded by plain transformers, without eckart, at the speed of its size; but axes that fit all blocks fit each
one less well. A head tied to the embedding stays tied, and the last norm keeps the diagonal of Q^T diag(g) Q; with
`untie=true`, as in the authors' code, the head takes in g and becomes a matrix of its own, which the budget counts. The
width is a multiple of the number of heads, a rule of transformers: a budget is met only within one such step, a large
one in a narrow model.

Structure: fewer residual coordinates. Metric: second moment of the normalized stream. Budget: one width for all.
Solver: PCA. Trained: nothing. Decoders with RMSNorm whose config states the size of heads.

Source: Ashkboos et al. 2024, "SliceGPT: Compress large language models by deleting rows and columns", sections 3.2-3.4.
"""

from eckart.methods.compress.recipe import Recipe, input_moment


def slicegpt(*, untie: bool = False) -> Recipe:
    """PCA of the residual stream, one rotation for the whole model, written as a plain narrower model.

    Args:
        untie: whether a head tied to the embedding gets a matrix of its own.
    """
    return Recipe(metric=input_moment, uses_inputs=True, sliced=True, untie=untie)
