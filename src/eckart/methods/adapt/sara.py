"""SaRA: the smallest weights, which did little, train.

    W' = W + P,    P zero outside of {|W| < t},    penalty  lambda |M * W + P|_*,  M the support

With a penalty, what trains is M * W + P itself (but for zeros of W), and its start is subtracted by a frozen change.
The gradient is sampled at the support and no dense one is kept (maps/support.py). Weights below t are counted layer
by layer; the published optimizer passes trained values through abs(), which is left out.

After half of the training only what is still small trains on: places with |W'| < t, the optimizer's memory of them
starting anew as it does there. What grew keeps what it learned, in a second sparse change, which is frozen; its places
among the trained values are held at zero, so that no shape changes.

Moves between optimizer steps: trained without `adapters(model).follow(optimizer, steps)` all of the support trains on.

Structure: sparse values added. Start: W. Trained: P on the support; as many numbers as |W| < t.

Source: Hu et al. 2024, "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
and its published optimizer for the penalty, off unless asked for, and the learning rate 1e-3 exp(-350 t). It penalizes
one of L matrices, drawn at random, in every step; here all are, so that its 5e-4 is 5e-4 / L here.
"""

import math
from typing import cast

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.hosts import Adapter, map_of
from eckart.maps import Sparse, sparse
from eckart.methods.adapt.between import Behind, Between
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, moved_start
from eckart.methods.adapt.support import added_on, make_room, places_of, retire, trained_values
from eckart.optim import forget

# The buffer of which values are small no more.
GREW = "grew"


def sara(*, threshold: float = 2e-3, nuclear: float = 0.0, progressive: float = 0.5) -> Recipe:
    """Train the smallest weights.

    Args:
        threshold: t; weights of smaller magnitude train.
        nuclear: lambda, weight of the nuclear norm of what trains; above 0 it costs an SVD of every matrix in every
            step.
        progressive: share of the steps after which only what is still small trains on; 0 for never.
    """
    if threshold <= 0 or nuclear < 0:
        raise EckartError(f"threshold must be positive and nuclear not negative, got {threshold} and {nuclear}")
    if not 0 <= progressive < 1:
        raise EckartError(f"progressive must be at least 0 and below 1, got {progressive}")

    def build(layer: Layer) -> Adapter:
        weight = layer.weight()
        chosen = weight.abs() < threshold
        if not bool(chosen.any()):
            least = float(weight.abs().min())
            raise EckartError(f"{layer.name} has no weight below threshold={threshold}; its smallest is {least:.2g}")
        return moved_start(sparse(weight * chosen)) if nuclear else Adapter([added_on(chosen)])

    def penalty(adapter: Adapter) -> Tensor:
        trained = map_of(trained_values(adapter).delta).dense()
        return nuclear * cast(Tensor, torch.linalg.matrix_norm(trained, "nuc"))

    def prepare(layer: Layer, adapter: Adapter, steps: int) -> None:
        make_room(adapter)
        delta = trained_values(adapter).delta
        delta.register_buffer(GREW, torch.zeros_like(delta.get_parameter("values"), dtype=torch.bool))

    def behind(layer: Layer, adapter: Adapter, at: Behind) -> None:
        done, half, delta = at.index + 1, round(progressive * at.steps), trained_values(adapter).delta
        values, grew = delta.get_parameter("values"), delta.get_buffer(GREW)
        if done == half:
            weight = adapter.of(map_of(layer.module)).dense()
            grew.copy_(weight.flatten()[places_of(cast(Sparse, map_of(delta)))].abs() >= threshold)
            retire(adapter, grew)
            at.optimizer.state.pop(values, None)
        elif done > half:
            values[grew] = 0
            forget(at.optimizer, values, (grew,))

    moves = Between(prepare, behind) if progressive else None
    rate = 1e-3 * math.exp(-350 * threshold)
    return Recipe(build, rate, penalty=penalty if nuclear else None, between=moves)
