"""SVD-LLM (v1): truncation-aware data whitening and a closed-form update of the left factor.

    S S^T = E[x x^T] (Cholesky),    W' = trunc_k(W S) S^(-1) = W_u W_v
    update, block by block on the inputs x^ of the compressed model:  W_u = argmin E |W x^ - W_u W_v x^|^2

Structure: low rank. Metric: input second moment. Budget: uniform. Solver: SVD, least squares for the update.
Trained: nothing; the paper's LoRA healing is `heal=2 heal_kind=lora`, for this method as for others.

Source: Wang et al. 2024, "SVD-LLM", section 3; the update regresses the layer's own dense output on the compressed
inputs, as in the authors' code (AIoT-MLSys-Lab/SVD-LLM, `local_update`).
"""

from eckart.methods.compress.recipe import Recipe, input_moment


def svd_llm(*, update: bool = True) -> Recipe:
    """SVD of the whitened weight, then the sequential update of the left factor.

    Args:
        update: whether to refit the left factor on the compressed model's inputs.
    """
    return Recipe(metric=input_moment, uses_inputs=True, update=update)
