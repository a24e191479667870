"""WeLore: low rank only where the spectrum has a heavy tail.

    s_i = (sigma_i - min sigma) / (max sigma - min sigma);  drop every singular value with s_i below one global tau

Structure: low rank on matrices that this makes smaller, the others dense. Metric: Frobenius. Budget: one threshold on
normalized spectra. Solver: SVD. Trained in the paper: only the low-rank matrices, afterwards. No data.

Source: Jaiswal et al. 2024, "From GaLore to WeLore", section 3.2; normalization and the rule that a matrix is factored
only if that saves numbers as in VITA-Group/WeLore (`weight_thresold_rank_pruning`, `min_ratio`).
"""

from eckart.fit import Metric
from eckart.methods.compress.recipe import Recipe, normalized_spectrum


def welore() -> Recipe:
    """Truncated SVD with ranks from one threshold on min-max normalized singular values, data-free."""
    return Recipe(metric=lambda data: Metric(), allocation="threshold", score=normalized_spectrum)
