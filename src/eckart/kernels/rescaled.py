"""Triton kernels of low-rank changes whose rows are rescaled (DoRA); `eckart.linalg.rescaled` says what they compute.

    compose     y <- c * (y + s h U^T) + b                       one pass over y, where torch takes three
    gradients   dy -> c * dy, sum_t dy * y, sum_t dy             one pass over dy and y, where torch takes three
    row norms   |W_i|^2 + 2 s (W D^T)_i . U_i                    one pass over W, where torch takes two

The large products with W stay with the vendor's library. Everything is accumulated in float32, sums over rows in a
fixed order: no atomic additions, so the same inputs give the same bits. WIDEN is for Triton's interpreter on CPU, whose
products of bfloat16 are wrong; those of the same numbers in float32 are what tensor cores compute.

Source: "Scaling DoRA: High-Rank Adaptation via Factored Norms and Fused Kernels" for what is fused; the second kernel
follows from the gradient of g from the output (hosts/factored.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a tile, and ranks taken at once: tiles of 64 x 64 in float32 fit the registers of four warps.
TILE, RANKS = 64, 32
# Rows of W, and columns taken at once, of a tile of the norms.
NORM_ROWS, NORM_COLUMNS, NORM_RANKS = 32, 64, 64
# Rows whose sums one program of the gradients adds up.
SUMMED = 512


@triton.jit
def _compose(
    y: tl.tensor, hidden: tl.tensor, up: tl.tensor, ratio: tl.tensor, bias: tl.tensor, scale: tl.tensor,
    t: tl.tensor, m: tl.tensor, r: tl.tensor,
    BIASED: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, r, RANKS):
        ranks = start + tl.arange(0, RANKS)
        inside = (rows < t)[:, None] & (ranks < r)[None, :]
        h = tl.load(hidden + rows[:, None] * r + ranks[None, :], mask=inside, other=0.0)
        inside = (ranks < r)[:, None] & (columns < m)[None, :]
        u = tl.load(up + columns[None, :] * r + ranks[:, None], mask=inside, other=0.0)
        if WIDEN:
            h, u = h.to(tl.float32), u.to(tl.float32)
        product = tl.dot(h, u, product, input_precision="ieee")
    inside = (rows < t)[:, None] & (columns < m)[None, :]
    at = rows[:, None] * m + columns[None, :]
    base = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(ratio + columns, mask=columns < m, other=0.0)
    out = (base + scale * product) * c[None, :]
    if BIASED:
        out += tl.load(bias + columns, mask=columns < m, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(
    gradient: tl.tensor, y: tl.tensor, ratio: tl.tensor, inner: tl.tensor, products: tl.tensor, totals: tl.tensor,
    t: tl.tensor, m: tl.tensor,
    SUMS: tl.constexpr, SUMMED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.load(ratio + columns, mask=columns < m, other=0.0)
    product = tl.zeros((COLUMNS,), dtype=tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, SUMMED, ROWS):
        rows = part * SUMMED + start + tl.arange(0, ROWS)
        inside = (rows < t)[:, None] & (columns < m)[None, :]
        at = rows[:, None] * m + columns[None, :]
        dy = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(inner + at, (dy * c[None, :]).to(inner.dtype.element_ty), mask=inside)
        if SUMS:
            product += tl.sum(dy * tl.load(y + at, mask=inside, other=0.0).to(tl.float32), axis=0)
            total += tl.sum(dy, axis=0)
    if SUMS:
        tl.store(products + part * m + columns, product, mask=columns < m)
        tl.store(totals + part * m + columns, total, mask=columns < m)


@triton.jit
def _norms(
    weight: tl.tensor, up: tl.tensor, down: tl.tensor, squares: tl.tensor, scale: tl.tensor,
    m: tl.tensor, n: tl.tensor, r: tl.tensor,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    image = tl.zeros((ROWS, RANKS), dtype=tl.float32)  # of these rows of W D^T
    own = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        w = tl.load(weight + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
        inside = (columns < n)[:, None] & (ranks < r)[None, :]
        d = tl.load(down + ranks[None, :].to(tl.int64) * n + columns[:, None], mask=inside, other=0.0)
        wide = w.to(tl.float32)
        if WIDEN:
            image = tl.dot(wide, d.to(tl.float32), image, input_precision="ieee")
        else:
            image = tl.dot(w, d, image, input_precision="ieee")
        own += tl.sum(wide * wide, axis=1)
    inside = (rows < m)[:, None] & (ranks < r)[None, :]
    u = tl.load(up + rows[:, None] * r + ranks[None, :], mask=inside, other=0.0)
    out = 2 * scale * tl.sum(image * u, axis=1)
    if tl.program_id(1) == 0:
        out += own
    tl.store(squares + tl.program_id(1) * m + rows, out, mask=rows < m)


def compose(base: Tensor, hidden: Tensor, up: Tensor, ratio: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return c * (base + s h U^T) + b, written over base.

    Args:
        base: (t, m), contiguous.
        hidden: h (t, r), of base's dtype.
        up: U (m, r), of base's dtype.
        ratio: c (m,).
        bias: b (m,), or None.
        scale: s.
    """
    t, m = base.shape
    hidden, up, ratio = hidden.contiguous(), up.contiguous(), ratio.float().contiguous()
    with torch.cuda.device_of(base):
        _compose[triton.cdiv(t, TILE), triton.cdiv(m, TILE)](
            base, hidden, up, ratio, ratio if bias is None else bias.contiguous(), scale, t, m, up.shape[1],
            BIASED=bias is not None, WIDEN=not base.is_cuda, ROWS=TILE, COLUMNS=TILE, RANKS=RANKS,
        )  # fmt: skip
    return base


def gradients(gradient: Tensor, y: Tensor, ratio: Tensor, *, sums: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return c * dy (t, m), and if asked for sum_t dy * y and sum_t dy, (m,) float32.

    Args:
        gradient: dy (t, m).
        y: (t, m).
        ratio: c (m,).
        sums: whether the sums are wanted.
    """
    gradient, y = gradient.contiguous(), y.contiguous()
    (t, m), parts = gradient.shape, triton.cdiv(len(gradient), SUMMED)
    inner, partial = torch.empty_like(gradient), ratio.new_empty(2, parts, m, dtype=torch.float32)
    with torch.cuda.device_of(gradient):
        _gradients[parts, triton.cdiv(m, TILE)](
            gradient, y, ratio.float().contiguous(), inner, partial[0], partial[1], t, m,
            SUMS=sums, SUMMED=SUMMED, ROWS=TILE, COLUMNS=TILE,
        )  # fmt: skip
    return (inner, partial[0].sum(0), partial[1].sum(0)) if sums else (inner, None, None)


def squares_and_cross(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """Return |W_i|^2 + 2 s (W D^T)_i . U_i for every row, (m,) float32.

    Args:
        weight: W (m, n).
        up: U (m, r).
        down: D (r, n).
        scale: s.
    """
    (m, n), r = weight.shape, up.shape[1]
    parts = max(1, triton.cdiv(r, NORM_RANKS))
    weight, up, down = weight.contiguous(), up.float().contiguous(), down.to(weight.dtype).contiguous()
    squares = weight.new_empty(parts, m, dtype=torch.float32)
    with torch.cuda.device_of(weight):
        _norms[triton.cdiv(m, NORM_ROWS), parts](
            weight, up, down, squares, scale, m, n, r,
            WIDEN=not weight.is_cuda, ROWS=NORM_ROWS, COLUMNS=NORM_COLUMNS, RANKS=NORM_RANKS,
        )  # fmt: skip
    return squares.sum(0)
