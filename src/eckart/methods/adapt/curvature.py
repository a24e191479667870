"""Finding the learning rate from the curvature of the loss as AdamW sees it: a few passes in place of short runs.

    rate = c * edge / lambda_max(P^-1/2 H P^-1/2),   P = diag(sqrt(E g^2) + eps) / share,   edge = (2 + 2 b1) / (1 - b1)

H is the Hessian of the loss by what trains, P what Adam divides gradients by, edge = 38 at Adam's b1 = 0.9 the largest
product of rate and eigenvalue at which Adam does not oscillate on a quadratic. A method that starts from B = 0 has no
gradient by A there, hence P = 0: so the curvature is taken behind a few steps at the method's own rate. Products with H
are central differences of gradients: attention kernels and several autograd functions have no second derivative.

Source: Cohen et al. 2022, "Adaptive Gradient Methods at the Edge of Stability", equation 2, for the edge.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from eckart.errors import EckartError
from eckart.linalg import largest_eigenvalue

# (2 + 2 b1) / (1 - b1) at AdamW's b1 = 0.9, and what it adds to the root of the mean square.
EDGE, EPSILON = 38.0, 1e-8
# Share of the edge: between the two that were best on the fine-tunes of benchmarks/rates.py, which differ five times.
SHARE_OF_EDGE = 0.1
# Steps of AdamW before, batches that curvature and mean squares are of, and products with the Hessian.
WARM, BATCHES, PRODUCTS = 10, 4, 6
# Largest change of a parameter in a difference, on average over them, in steps of Adam.
REACH = 1.0


def edge_rate(
    model: nn.Module,
    batches: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    rate: float,
    share: Callable[[str], float],
    seed: int,
) -> float:
    """Return edge / lambda_max where the model is: the largest rate at which AdamW does not oscillate there.

    Costs 1 + 2 * `PRODUCTS` passes forward and backward over the batches.

    Args:
        model: what trains, its trained parameters requiring gradients; in evaluation mode, and left as it was.
        batches: examples, (batch, ...) each.
        loss: of a batch.
        rate: one that is of the right order, which differences of gradients step by.
        share: of the rate that a parameter of that name has.
        seed: of the start of the iteration.

    Raises:
        EckartError: if no gradient reaches what trains, or the loss is nowhere convex.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters, start = list(named.values()), [p.detach().clone() for p in named.values()]

    def gradient(batch: Tensor) -> Tensor:
        found = torch.autograd.grad(loss(batch), parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten().double() for part in found])

    squares = torch.stack([gradient(batch).square() for batch in batches]).mean(0)
    shares = torch.cat([p.new_full((p.numel(),), share(name)) for name, p in named.items()]).double()
    # What no gradient reaches does not move.
    root = torch.where(squares > 0, (shares / (squares.sqrt() + EPSILON)).sqrt(), 0.0)
    if not bool((root > 0).any()):
        raise EckartError("no gradient reaches what trains; give a rate")

    def at(shift: Tensor, factor: float) -> Tensor:
        with torch.no_grad():
            parts = shift.split([p.numel() for p in parameters])
            for parameter, first, part in zip(parameters, start, parts, strict=True):
                parameter.copy_(first + factor * part.view_as(first))
        return sum((gradient(batch) for batch in batches), torch.zeros_like(shift)) / len(batches)

    def product(vector: Tensor) -> Tensor:
        direction = root * vector
        step = REACH * rate / float(direction.square().mean().sqrt())
        return root * (at(direction, step) - at(direction, -step)) / (2 * step)

    draw = torch.randn(len(root), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        largest = largest_eigenvalue(product, draw.to(root.device) * (root > 0), PRODUCTS)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    if not largest > 0:
        raise EckartError("the loss curves upward in no direction that was looked at; use --rate auto, or give a rate")
    return EDGE / largest
