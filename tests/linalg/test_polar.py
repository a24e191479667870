"""The polar factor is orthonormal and no other orthonormal matrix is nearer."""

import pytest
import torch

from eckart.linalg import polar_factor


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_nearest_of_many(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    found, small = polar_factor(matrix), min(shape)
    gram = found @ found.mT if shape[0] <= shape[1] else found.mT @ found
    torch.testing.assert_close(gram, torch.eye(small, dtype=torch.float64))
    for _ in range(50):
        other = torch.linalg.qr(torch.randn(max(shape), small, generator=generator, dtype=torch.float64))[0]
        other = other.mT if shape[0] <= shape[1] else other
        assert float((other * matrix).sum()) <= float((found * matrix).sum()) + 1e-9
