"""Sums of Kronecker products: a matrix of blocks that are all combinations of a few."""

import math

import torch
from torch import Tensor

from eckart.maps.base import LinearMap, linear_map, require


@linear_map
class Kronecker(LinearMap):
    """W = sum_r A_r (x) B_r:  entry A_rij B_rkl in row i p + k and column j q + l, for B_r of shape (p, q).

    With x as a matrix X (n_A, n_B), y is sum_r A_r X B_r^T, and W is never written out.

    Attributes:
        left: A (r, m_A, n_A).
        right: B (r, m_B, n_B).
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        came = f"left {tuple(self.left.shape)} and right {tuple(self.right.shape)}"
        fits = self.left.ndim == self.right.ndim == 3 and self.left.shape[0] == self.right.shape[0]
        require(fits, "Kronecker", came, "two stacks of as many matrices")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[1] * self.right.shape[1], self.left.shape[2] * self.right.shape[2]

    def __call__(self, x: Tensor) -> Tensor:
        terms, m_a, n_a = self.left.shape
        m_b, n_b = self.right.shape[1:]
        vectors = math.prod(x.shape[:-1])
        # (t n_A, n_B) -> (t n_A, r m_B), seen as (t, n_A r, m_B) -> (t, m_A, m_B): nothing as large as x is transposed
        inner = x.reshape(vectors * n_a, n_b) @ self.right.reshape(terms * m_b, n_b).mT
        left = self.left.permute(1, 2, 0).reshape(m_a, n_a * terms)
        y = torch.bmm(left.expand(vectors, -1, -1), inner.view(vectors, n_a * terms, m_b))
        return y.view(*x.shape[:-1], m_a * m_b)

    @property
    def T(self) -> LinearMap:
        return Kronecker(self.left.mT, self.right.mT)

    def dense(self) -> Tensor:
        return arranged(self.left.flatten(1).mT @ self.right.flatten(1), self.left.shape[1:], self.right.shape[1:])

    def flops(self, tokens: int = 1) -> int:
        terms, m_a, n_a = self.left.shape
        m_b, n_b = self.right.shape[1:]
        return 2 * tokens * terms * n_a * m_b * (n_b + m_a)

    def dense_flops(self) -> int:
        return 2 * self.left.numel() * self.right.shape[1] * self.right.shape[2]


def arranged(products: Tensor, left: tuple[int, ...], right: tuple[int, ...]) -> Tensor:
    """Return the matrix whose entry (i k)(j l) is that of products at (i j)(k l).

    Args:
        products: (m_A n_A, m_B n_B).
        left: (m_A, n_A).
        right: (m_B, n_B).
    """
    (m_a, n_a), (m_b, n_b) = left, right
    return products.reshape(m_a, n_a, m_b, n_b).transpose(1, 2).reshape(m_a * m_b, n_a * n_b)


def rearranged(matrix: Tensor, left: tuple[int, ...], right: tuple[int, ...]) -> Tensor:
    """Return the inverse of `arranged`: every block of shape `right` is a row, (m_A n_A, m_B n_B).

    A Kronecker product becomes a matrix of rank 1, a sum of r of them one of rank r (Van Loan and Pitsianis 1993).
    """
    (m_a, n_a), (m_b, n_b) = left, right
    return matrix.reshape(m_a, m_b, n_a, n_b).transpose(1, 2).reshape(m_a * n_a, m_b * n_b)
