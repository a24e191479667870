"""FuseGPT: blocks removed one by one, the weights of each grafted onto its neighbours; a plain shallower model.

    MI_i = 1 - E[ cos(y, y_without_i) ],    y the last block's output, measured anew after each removal
    W_t <- W_t + B A + (C D) * W_removed,   * by entries, for every linear layer of every block of the group
    min over A, B, C, D, norms and biases of  | group'(x) - group(x) |^2 / | group(x) |^2

The block of least macro influence goes. The group is the blocks around it (8 with itself); W_removed is the removed
block's layer of the same name, frozen, and its coefficients C D begin at zero, as B A does. After training all of it is
folded into dense weights, and plain transformers loads the folder. Blocks go whole: what remains is the nearest size at
or below the budget.

Deviations from the authors' code: the loss is the relative squared distance of the group's outputs, where they have a
divergence of softmaxes over the sequences of a batch; what was grafted is folded in before the next removal instead of
being trained on; a learning rate of 9.65e-6 for everything but coefficients is theirs.

Structure: fewer blocks. Metric: cosine of the last block's outputs. Budget: whole blocks. Solver: AdamW per removal,
20 passes over the calibration samples. Trained: the group around each removed block; `epochs=0` for plain removal.

Source: Pei et al. 2024, "FuseGPT: Learnable layers fusion of generative pre-trained transformers", section 3; settings
as in JarvisPei/FuseGPT.
"""

from eckart.methods.compress.recipe import Recipe, input_moment
from eckart.methods.compress.removal import Removal


def fusegpt(
    *, group: int = 8, rank: int = 128, epochs: int = 20, rate: float = 1e-3, base_rate: float = 9.65e-6
) -> Recipe:
    """Whole blocks removed by macro influence, the weights of each fused into its neighbours by local training.

    Args:
        group: blocks around the removed one, itself included.
        rank: of updates and coefficients, at most that of the matrix.
        epochs: passes over the calibration samples per removal; 0 for plain removal.
        rate: learning rate of the coefficients.
        base_rate: that of low-rank updates, norms and biases.
    """
    return Recipe(metric=input_moment, removal=Removal(True, group, rank, epochs, rate, base_rate))
