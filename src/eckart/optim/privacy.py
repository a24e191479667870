"""What training with clipped, noisy gradients of random batches gives away: (epsilon, delta) of differential privacy.

A step takes every example with probability q, clips its gradient to norm C, and adds N(0, (z C)^2) to the sum. Its
Renyi divergence of whole order a, for two data sets that differ by one example, is at most

    R(a) = 1 / (a - 1) log sum_k binom(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 z^2))

Steps add up, and  epsilon = T R(a) + log(1 - 1/a) - (log delta + log a) / (a - 1)  for the best order a.

Source: Mironov, Talwar and Zhang 2019, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", section 3.3;
Balle et al. 2020, "Hypothesis Testing Interpretations and Renyi Differential Privacy", theorem 21, for the conversion.
"""

import math
from functools import lru_cache

from eckart.errors import EckartError

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
# Largest noise that is looked for, and relative accuracy of the one found.
MOST_NOISE, ACCURACY = 1e5, 1e-3


@lru_cache(maxsize=4096)
def renyi_divergence(order: int, share: float, noise: float) -> float:
    """Return R(a) of one step, in nats.

    Args:
        order: a, at least 2.
        share: q, with which an example is taken.
        noise: z, deviation of the noise in relation to the clipped norm.
    """
    if share == 0:
        return 0.0
    if share == 1:
        return order / (2 * noise**2)
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-share) + k * math.log(share) + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]  # fmt: skip
    largest = max(terms)
    total = math.fsum(math.exp(term - largest) for term in terms)
    return float(largest + math.log(total)) / (order - 1)


def epsilon(share: float, noise: float, steps: int, delta: float) -> float:
    """Return the epsilon that steps of training give away at a delta.

    Args:
        share: probability q with which an example is in a batch.
        noise: deviation of the noise in relation to the clipped norm; 0 protects nothing.
        steps: how many.
        delta: probability that may be beyond epsilon.

    Raises:
        EckartError: for what is no probability, or negative noise or steps.
    """
    if not 0 <= share <= 1 or not 0 < delta < 1 or noise < 0 or steps < 0:
        came = f"share {share}, noise {noise}, steps {steps}, delta {delta}"
        raise EckartError(f"share and delta must be probabilities, noise and steps not negative; got {came}")
    if steps == 0 or share == 0:
        return 0.0
    if noise == 0:
        return math.inf
    found: list[float] = [
        steps * renyi_divergence(a, share, noise) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in ORDERS
    ]
    return max(0.0, min(found))


def noise_for(target: float, share: float, steps: int, delta: float) -> float:
    """Return the least noise, to a thousandth, at which training stays within an epsilon.

    Args:
        target: epsilon.
        share: probability q with which an example is in a batch.
        steps: how many.
        delta: probability that may be beyond epsilon.

    Raises:
        EckartError: for what `epsilon` refuses, or a target that no noise reaches.
    """
    low, high = 0.0, 1.0
    while epsilon(share, high, steps, delta) > target:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise EckartError(
                f"no noise keeps {steps} steps within epsilon {target} at delta {delta}; give a larger epsilon"
            )
    while high - low > ACCURACY * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon(share, middle, steps, delta) > target else (low, middle)
    return high
