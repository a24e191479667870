"""ShortGPT: whole blocks removed by how little each turns its input, in one shot; a plain shallower model.

    BI_i = 1 - E[ x_i . x_(i+1) / (|x_i| |x_(i+1)|) ],    x_i the input of block i, x_(i+1) its output

The blocks of least block influence go, as many as the budget asks for; nothing else changes, and plain transformers
loads the folder. Blocks go whole: what remains is the nearest size at or below the budget.

Structure: fewer blocks. Metric: cosine of a block's input and output. Budget: whole blocks. Solver: none.
Trained: nothing.

Source: Men et al. 2024, "ShortGPT: Layers in large language models are more redundant than you expect", section 2.
"""

from eckart.methods.compress.recipe import Recipe, input_moment
from eckart.methods.compress.removal import Removal


def shortgpt() -> Recipe:
    """Whole blocks removed by block influence, written as a plain shallower model."""
    return Recipe(metric=input_moment, removal=Removal())
