"""Rotations and reflections with few numbers."""

import math

import torch
from torch import Tensor

from eckart.maps.base import LinearMap, linear_map, require


@linear_map
class Householder(LinearMap):
    """W = H_1 H_2 ... H_r,  H_i = I - 2 u_i u_i^T / |u_i|^2: a chain of reflections in r n numbers.

    Applied in the compact WY form  W = I - U M U^T,  M^-1 = striu(U^T U) + I / 2  with the unit vectors u_i as the
    columns of U: two thin products and r equations, where the chain itself would take r steps. A vector of zeros
    reflects nothing.

    Attributes:
        vectors: u, (r, n), of any length.

    Source: Schreiber and Van Loan 1989, "A storage-efficient WY representation for products of Householder
    transformations".
    """

    vectors: Tensor

    def __post_init__(self) -> None:
        require(self.vectors.ndim == 2, "Householder", f"vectors {tuple(self.vectors.shape)}", "(r, n)")

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors.shape[1], self.vectors.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        vectors = wide(self.vectors)
        norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        unit = vectors / norms.where(norms > 0, 1.0)
        half = unit.new_full((unit.shape[0],), 0.5)
        inverse = (unit @ unit.mT).triu(1) + torch.diag(half)
        # x (I - U M U^T)^T = x - (x U) M^T U^T, and M^T U^T is what the transposed equations give.
        turned = torch.linalg.solve_triangular(inverse.mT, unit, upper=False)
        y: Tensor = x - (x @ unit.mT.to(x.dtype)) @ turned.to(x.dtype)
        return y

    @property
    def T(self) -> LinearMap:
        return Householder(self.vectors.flip(0))

    def flops(self, tokens: int = 1) -> int:
        r, n = self.vectors.shape
        return tokens * (4 * r * n + n) + self._solving()

    def dense_flops(self) -> int:
        return self.flops(self.shape[0])

    def _solving(self) -> int:
        """Return the operations of the WY form itself, which every call pays once."""
        r, n = self.vectors.shape
        return r * n + 2 * r * r * n + r * r + r * r * n


@linear_map
class Cayley(LinearMap):
    """W = blockdiag(R_1, ..., R_b),  R_i = (I + Q_i)(I - Q_i)^-1 with Q_i skew-symmetric: rotations of blocks.

    Attributes:
        skew: the entries of every Q_i above its diagonal, row by row, (b, s (s - 1) / 2).
        size: s, the side of a block.

    Source: Cayley 1846; as a layer's transform Qiu et al. 2023, "Controlling text-to-image diffusion by orthogonal
    finetuning", eq. 4.
    """

    skew: Tensor
    size: int

    def __post_init__(self) -> None:
        needed = self.size * (self.size - 1) // 2
        fits = self.size >= 1 and self.skew.ndim == 2 and self.skew.shape[1] == needed
        require(fits, f"Cayley with blocks of {self.size}", f"skew {tuple(self.skew.shape)}", f"(b, {needed})")

    @property
    def shape(self) -> tuple[int, int]:
        return self.skew.shape[0] * self.size, self.skew.shape[0] * self.size

    def __call__(self, x: Tensor) -> Tensor:
        blocks = x.reshape(math.prod(x.shape[:-1]), self.skew.shape[0], self.size).transpose(0, 1)  # (b, t, s)
        return torch.bmm(blocks, self.rotations().mT).transpose(0, 1).reshape(x.shape)

    @property
    def T(self) -> LinearMap:
        return Cayley(-self.skew, self.size)

    def rotations(self) -> Tensor:
        """Return the blocks R, (b, s, s)."""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.skew.device)
        count = self.skew.shape[0]
        each = torch.arange(count, device=self.skew.device)[:, None]
        upper = self.skew.new_zeros(count, self.size, self.size).index_put((each, rows[None], columns[None]), self.skew)
        skew = wide(upper - upper.mT)
        eye = torch.eye(self.size, dtype=skew.dtype, device=skew.device)
        rotations: Tensor = torch.linalg.solve(eye - skew, eye + skew)
        return rotations.to(self.skew.dtype)

    def flops(self, tokens: int = 1) -> int:
        b, s = self.skew.shape[0], self.size
        skew = b * s * s + 2 * b * s * s  # Q, and I with and without it
        return 2 * tokens * b * s * s + skew + b * (2 * s**3 // 3 + 2 * s**3)

    def dense_flops(self) -> int:
        return self.flops(self.shape[0])


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 if it is narrower: equations have no solver in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
