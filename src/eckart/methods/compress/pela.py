"""PELA: truncated SVD, then training towards the original's features while the weights stay near the original's.

    W ~ U_k V_k at the budget, then over everything inside the blocks
    min  cross-entropy + a mean_b |h'_b - h_b|^2 / |h_b|^2 + c mean_l |U V - W|_F^2 / |W|_F^2

h_b are the hidden states behind block b in the original model (behind the final norm as well for the last), h'_b those
in the compressed one.

Structure: low rank. Metric: Frobenius; `start=inputs` begins with the input second moment instead, which is SVD-LLM
without its update. Budget: uniform. Solver: SVD, then AdamW. Trained: everything inside the blocks. Both terms are the
paper's; it trains on the original data for epochs, here it is 300 steps on the calibration text, with weights a = 1 and
c = 0.1 of relative distances, so that they mean the same in every model.

Source: Guo et al. 2024, "PELA: learning parameter-efficient models with low-rank approximation", section 3; layers with
fewer than 10 outputs are left alone, as in guoyang9/PELA and as everywhere here.
"""

from typing import Literal

from eckart.fit import Metric
from eckart.methods.compress.learner import Learner, course
from eckart.methods.compress.recipe import LayerData, Recipe, check_least, input_moment


def pela(
    *,
    tune: int = 300,
    rate: float = 1e-3,
    batch: int = 4,
    start: Literal["weights", "inputs"] = "weights",
    features: float = 1.0,
    departure: float = 0.1,
) -> Recipe:
    """Truncated SVD, then distillation of the original's hidden states and a pull towards its weights.

    Args:
        tune: steps of the training.
        rate: its learning rate.
        batch: windows per step.
        start: metric of the truncation.
        features: weight of the distance between hidden states.
        departure: weight of the distance between weights.
    """
    check_least("features", features, 0)
    check_least("departure", departure, 0)
    learner = Learner(
        tuning=course(tune, rate, batch), everything=True, features=features, departure=departure, any_size=False
    )
    if start == "inputs":
        return Recipe(metric=input_moment, uses_inputs=True, learner=learner)

    def plain(data: LayerData) -> Metric:
        return Metric()

    return Recipe(metric=plain, learner=learner)
