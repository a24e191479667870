"""What "close to the original" means for one layer: the metric that every fit minimises.

    E | T (W x - W' x^ - c) |^2,    T^T T = B

Legend: x the original input (n,), x^ the input inside the already compressed model, G = E[x x^T], G^ = E[x^ x^^T],
C = E[x x^^T], B = E[g g^T] with g the gradient of the loss at the layer's output (m,).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.linalg import all_finite, psd_roots, shrink

PARTS = ("inputs", "shifted", "cross", "outputs", "mean", "shifted_mean")


@dataclass(frozen=True, slots=True)
class Metric:
    """Moments of a layer's inputs and output gradients, in float64; every part left out is the identity.

    Attributes:
        inputs: G, (n, n), (n,) if diagonal, or None for the identity.
        shifted: G^, (n, n), or None if the fitted layer sees the original input.
        cross: C, (n, n), given with `shifted`.
        outputs: B, (m, m), (m,) if diagonal, or None for the identity.
        mean: E[x], (n,). If given, the moments are central and the fit comes with a bias c.
        shifted_mean: E[x^], (n,), given with `shifted` if there is a mean.
    """

    inputs: Tensor | None = None
    shifted: Tensor | None = None
    cross: Tensor | None = None
    outputs: Tensor | None = None
    mean: Tensor | None = None
    shifted_mean: Tensor | None = None
    _roots: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _on_seen: "list[Metric]" = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in PARTS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value.double())
        if (self.shifted is None) != (self.cross is None):
            raise EckartError("a metric on shifted inputs needs both their second moment and the cross moment")
        if self.shifted is not None and (self.mean is None) != (self.shifted_mean is None):
            raise EckartError("a centred metric on shifted inputs needs both means")
        for name in PARTS:
            value = getattr(self, name)
            if value is not None and not all_finite(value):
                raise EckartError(
                    f"the metric's {name} holds NaN or Inf; the calibration run overflowed or lost its data"
                )

    @property
    def seen(self) -> Tensor | None:
        """The second moment of what the fitted layer sees: G^ if shifted, else G."""
        return self.inputs if self.shifted is None else self.shifted

    def roots(self, side: Literal["seen", "outputs"]) -> tuple[Tensor, Tensor] | None:
        """Return the root of `seen` or `outputs` and its inverse, made once for all fits; None for the identity."""
        moment = self.seen if side == "seen" else self.outputs
        if moment is None:
            return None
        if side not in self._roots:
            self._roots[side] = psd_roots(moment)
        return self._roots[side]

    def on_seen(self) -> "Metric":
        """Return the metric of a fit to the unconstrained optimum: on what the layer sees, without shift and means."""
        if self.shifted is None and self.mean is None:
            return self
        if not self._on_seen:
            self._on_seen.append(Metric(inputs=self.seen, outputs=self.outputs))
        return self._on_seen[0]

    def check(self, weight: Tensor) -> None:
        """Raise an `EckartError` unless every part fits a weight of shape (m, n)."""
        m, n = weight.shape
        for name in ("inputs", "shifted", "cross", "mean", "shifted_mean"):
            self._check_part(name, n, diagonal=name == "inputs")
        self._check_part("outputs", m, diagonal=True)

    def _check_part(self, name: str, size: int, diagonal: bool) -> None:
        value: Tensor | None = getattr(self, name)
        wanted = [(size,)] if "mean" in name else [(size, size)] + [(size,)] * diagonal
        if value is not None and tuple(value.shape) not in wanted:
            raise EckartError(f"the metric's {name} has shape {tuple(value.shape)}, but the layer needs {wanted[0]}")


def weighted(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """Return M @ matrix for a symmetric moment M that may be diagonal, (n,), or None for the identity."""
    if moment is None:
        return matrix
    moment = moment.to(matrix.dtype)
    return moment @ matrix if moment.ndim == 2 else moment[:, None] * matrix


def weighted_rows(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """Return matrix @ M for a symmetric moment M that may be diagonal, (n,), or None for the identity."""
    if moment is None:
        return matrix
    return matrix @ moment if moment.ndim == 2 else matrix * moment


def metric(
    second: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    shifted: Tensor | None = None,
    cross: Tensor | None = None,
    shifted_mean: Tensor | None = None,
    outputs: Tensor | None = None,
    input_shrinkage: float = 0.0,
    output_shrinkage: float = 0.0,
    anchor: float = 1.0,
) -> Metric:
    """Build a metric from raw (uncentred) moments, in float64, with stated shrinkage.

    Shrinking the inputs is adding an isotropic input that both streams share, so it also pulls the fit of directions
    without data towards the original weight.

    Args:
        second: E[x x^T], (n, n), or (n,) without `shifted`.
        mean: E[x]; if given, everything is centred and the fit has a bias.
        shifted: E[x^ x^^T].
        cross: E[x x^^T].
        shifted_mean: E[x^].
        outputs: E[g g^T], (m, m) or (m,).
        input_shrinkage: a in [0, 1] for the input moments.
        output_shrinkage: a in [0, 1] for the output moment.
        anchor: how much of the target is the original output W x; the rest is W x^, what the layer would give on the
            input it sees. 1 is AA-SVD's anchored objective, 0 ignores the shift, 0.25 is PIFA's mixture.

    Raises:
        EckartError: for moments of different sizes, one without the other it needs, NaN, or shrinkage beyond [0, 1].
    """
    _check_sizes({"second": second, "shifted": shifted, "cross": cross, "mean": mean, "shifted_mean": shifted_mean})
    g, hat, both = (None if t is None else t.double() for t in (second, shifted, cross))
    mx, mh = (None if t is None else t.double() for t in (mean, shifted_mean))
    if mx is not None and g is not None:
        g = g - (mx.square() if g.ndim == 1 else torch.outer(mx, mx))
    if hat is None or both is None:
        g = None if g is None else shrink(g, input_shrinkage)
    else:
        if mx is not None and mh is not None:
            hat, both = hat - torch.outer(mh, mh), both - torch.outer(mx, mh)
            mx = anchor * mx + (1 - anchor) * mh
        # The target is W z with z = anchor x + (1 - anchor) x^.
        # In place: of wide layers, each of these is a hundred megabytes and more.
        if g is not None:
            share = anchor * (1 - anchor)
            g = (anchor**2 * g).add_(both, alpha=share).add_(both.mT, alpha=share).add_(hat, alpha=(1 - anchor) ** 2)
        both = (anchor * both).add_(hat, alpha=1 - anchor)
        level = float(hat.diagonal().mean()) if hat.shape[0] else 0.0
        g, hat, both = (None if t is None else _with_isotropic(t, input_shrinkage, level) for t in (g, hat, both))
    weighted = None if outputs is None else shrink(outputs.double(), output_shrinkage)
    return Metric(g, hat, both, weighted, mx, mh)


def _check_sizes(parts: dict[str, Tensor | None]) -> None:
    """Raise an `EckartError` unless all moments of the inputs are of one size."""
    given = {name: tuple(t.shape) for name, t in parts.items() if t is not None}
    n = next((shape[0] for shape in given.values() if shape), 0)
    for name, shape in given.items():
        wanted: list[tuple[int, ...]] = [(n,)] if "mean" in name else [(n, n)]
        if name == "second" and parts["shifted"] is None:
            wanted.append((n,))
        if shape not in wanted:
            raise EckartError(f"metric: {name} has shape {shape} among moments {given}; it must be {wanted[0]}")


def _with_isotropic(moment: Tensor, amount: float, level: float) -> Tensor:
    """Return the moment after a share `amount` of the samples is replaced by isotropic noise of variance `level`."""
    if not 0.0 <= amount <= 1.0:
        raise EckartError(f"shrinkage must lie in [0, 1], got {amount}")
    out = (1 - amount) * moment
    out.diagonal().add_(amount * level)
    return out
