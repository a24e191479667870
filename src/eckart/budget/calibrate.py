"""Turning energies into losses with one probe per layer.

Removed energy is not comparable across layers; the divergence measured with only one layer compressed is. LEMS scales
each layer's energies so that they meet its measured divergence at one probe level:

    cost(l, r) = KL(model with only l at the probe level) * energy_l(r) / energy_l(probe level) * depth factor(l)

Source: LEMS 2026 (code of lems-svd/lems). Its depth factor 1 + gamma * norm(sum_{k >= l} 1 / (k + 1)^alpha) is found
there by ten Optuna trials; here gamma is a setting, 0 (no factor) by default.
"""

import statistics
from collections.abc import Mapping, Sequence

from eckart.budget.candidates import Candidates, Option

# The level LEMS probes at: the option that removes this share of the layer's numbers.
PROBE_REMOVED = 0.1


def probe_option(layer: Candidates, removed: float = PROBE_REMOVED) -> Option | None:
    """Return the largest compressed option that removes at least that share of the layer's numbers, if there is one."""
    fits = [o for o in layer.options[:-1] if o.numbers <= (1 - removed) * layer.dense.numbers]
    return fits[-1] if fits else None


def calibrated(
    layers: Sequence[Candidates],
    measured: Mapping[str, float],
    *,
    depth: Mapping[str, int] | None = None,
    gamma: float = 0.0,
    alpha: float = 1.0,
) -> list[Candidates]:
    """Return the candidates with losses scaled to the divergences measured at the probe option.

    A layer that has no probe option, no measurement or no loss there is scaled by the median factor of the others.

    Args:
        layers: candidates whose losses are energies or predicted increases.
        measured: divergence of the model with only that layer at its probe option, by layer.
        depth: block index by layer, for the depth factor.
        gamma: weight of the depth factor.
        alpha: its decay.
    """
    depths = _depth_factors(depth or {}, gamma, alpha)
    scales = {}
    for layer in layers:
        option, value = probe_option(layer), measured.get(layer.name)
        if option is not None and value is not None and option.loss > 0:
            scales[layer.name] = max(value, 0.0) / option.loss
    # A layer without a measurement must not stay on another scale than the rest.
    usual = statistics.median(scales.values()) if scales else 1.0
    return [layer.scaled(scales.get(layer.name, usual) * depths.get(layer.name, 1.0)) for layer in layers]


def _depth_factors(depth: Mapping[str, int], gamma: float, alpha: float) -> dict[str, float]:
    if not depth or gamma == 0:
        return {}
    last = max(depth.values())
    sums = [sum((k + 1) ** -alpha for k in range(b, last + 1)) for b in range(last + 1)]
    return {name: 1 + gamma * sums[b] / sums[0] for name, b in depth.items()}
