"""Triton kernels against float64 references: on a GPU where there is one, under Triton's interpreter elsewhere."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eckart.hosts.adapter import Adapter, Plus, Rescaled
from eckart.hosts.factored import factored_rescale
from eckart.kernels import rescaled_kernels
from eckart.linalg import rescaled as expressions
from eckart.maps import LowRank

triton = pytest.importorskip("triton", reason="triton is not installed, and nothing but kernels needs it")

from eckart.kernels import rescaled as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Tokens, outputs, inputs, rank: within a tile, on its edges, odd, more than one tile of every axis, rank above a block.
SIZES = [(1, 1, 1, 1), (3, 5, 7, 2), (64, 64, 64, 32), (65, 63, 66, 33), (130, 70, 129, 16), (520, 33, 20, 100)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
Normal = Callable[..., Tensor]

sizes = pytest.mark.parametrize("size", SIZES, ids=str)
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture
def normal() -> Normal:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors wherever they are take the kernels."""
    monkeypatch.setattr(expressions, "rescaled_kernels", lambda tensor: kernels)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, slack: float = 1.0) -> bool:
    """Whether the relative error is what rounding to that dtype explains."""
    return float((got.double() - wanted).norm()) <= slack * TOLERANCE[dtype] * float(wanted.norm()) + 1e-30


@sizes
@dtypes
@pytest.mark.parametrize("biased", [False, True])
def test_compose(normal: Normal, size: tuple[int, ...], dtype: torch.dtype, biased: bool):
    t, m, _, r = size
    base, hidden, up = (x.to(dtype) for x in (normal(t, m), normal(t, r), normal(m, r)))
    ratio, bias = normal(m), normal(m).to(dtype) if biased else None
    wanted = ratio.double() * (base.double() + 0.7 * hidden.double() @ up.double().mT)
    wanted = wanted if bias is None else wanted + bias.double()
    got = kernels.compose(base, hidden, up, ratio, bias, 0.7)
    assert got is base
    assert got.dtype == dtype
    assert close(got, wanted, dtype)


@sizes
@dtypes
def test_gradients(normal: Normal, size: tuple[int, ...], dtype: torch.dtype):
    t, m, _, _ = size
    gradient, y, ratio = normal(t, m).to(dtype), normal(t, m).to(dtype), normal(m)
    inner, products, totals = kernels.gradients(gradient, y, ratio, sums=True)
    assert inner.dtype == dtype
    assert close(inner, gradient.double() * ratio.double(), dtype)
    assert close(products, (gradient.double() * y.double()).sum(0), torch.float32)
    assert close(totals, gradient.double().sum(0), torch.float32)
    alone = kernels.gradients(gradient.mT.contiguous().mT, y, ratio, sums=False)  # as autograd may lay it out
    assert torch.equal(alone[0], inner)
    assert alone[1:] == (None, None)


@sizes
@dtypes
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_row_norms(normal: Normal, size: tuple[int, ...], dtype: torch.dtype, scale: float, forced: None):
    _, m, n, r = size
    weight, up, down = normal(m, n).to(dtype), normal(m, r), normal(r, n).to(dtype).float()
    added = scale * up.double() @ down.double()
    got = expressions.factored_row_norms(weight, up, down, scale)
    assert got.dtype == torch.float32
    error = (got.double().square() - (weight.double() + added).square().sum(1)).abs()
    largest = weight.double().square().sum(1) + added.square().sum(1)  # of the terms, which may cancel
    assert bool((error <= 3e-6 * largest).all())


@sizes
@dtypes
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_forward_and_backward(
    normal: Normal, size: tuple[int, ...], dtype: torch.dtype, biased: bool, forced: None
):
    t, m, n, r = size
    base = nn.Linear(n, m, bias=biased, device=DEVICE, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        base.weight.copy_(normal(m, n))
        if biased:
            base.bias.copy_(normal(m)).requires_grad_(True)
    adapter = Adapter([Plus(LowRank(normal(m, r), normal(r, n)), 0.5), Rescaled(normal(m).abs() + 0.5)]).to(DEVICE)
    plus, rescaled = adapter.chain()
    x, seed = normal(2, t, n).to(dtype).requires_grad_(), normal(2, t, m).to(dtype)
    y = factored_rescale(x, base, adapter)
    assert y is not None
    leaves = [x, *plus.factors(), rescaled.magnitude, *([base.bias.requires_grad_()] if biased else [])]
    got = [y.detach(), *torch.autograd.grad(y, leaves, seed)]

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rows = base.weight.double() + 0.5 * wide[1] @ wide[2]
    out = wide[0] @ (wide[3] / rows.norm(dim=1).detach())[:, None].mul(rows).mT
    out = out + wide[4] if biased else out
    wanted = [out.detach(), *torch.autograd.grad(out, wide, seed.double())]
    for one, other in zip(got, wanted, strict=True):
        assert close(one, other, dtype, slack=10)


def test_tensors_on_cpu_never_take_kernels():
    assert rescaled_kernels(torch.zeros(2, 2)) is None


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_gpus(architecture: int):
    """Down to the machine's code, without a GPU: the interpreter accepts more than the compiler does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(architecture)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compiled"] * 8


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from eckart.kernels import rescaled as k

def build(kernel, types, constants):
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" for n in names} | dict(zip(names, types))
    source = ASTSource(kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    assert made.asm["cubin"]
    print("compiled")

T, shapes = k.TILE, ["i32"] * 3
for d in ("*fp32", "*bf16"):
    for biased in (True, False):
        tile = {"BIASED": biased, "WIDEN": False, "ROWS": T, "COLUMNS": T, "RANKS": k.RANKS}
        build(k._compose, [d, d, d, "*fp32", d, "fp32", *shapes], tile)
    tile = {"SUMS": True, "SUMMED": k.SUMMED, "ROWS": T, "COLUMNS": T}
    build(k._gradients, [d, d, "*fp32", d, "*fp32", "*fp32", "i32", "i32"], tile)
    tile = {"WIDEN": False, "ROWS": k.NORM_ROWS, "COLUMNS": k.NORM_COLUMNS, "RANKS": k.NORM_RANKS}
    build(k._norms, [d, "*fp32", d, "*fp32", "fp32", *shapes], tile)
"""
