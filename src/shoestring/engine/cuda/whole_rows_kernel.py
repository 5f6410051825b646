"""Triton kernel of the products of a few rows with a narrow dense matrix: all inputs in one trip.

Such a product takes no time for its bytes or sums, but for what must come one behind another: the loads of the rows, a
chain of tensor-core instructions, what warps hand each other. So the weights are asked for before the kernel in front has
ended (PDL), and the inputs are cut into slices, which the warps multiply beside one another and then add up. A tile is a
power of two wide and most matrices are not, so that a tail follows: 576 inputs are 512 and 64, both of them cut.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.linear_kernels import added_to, finish, gains_of, left_squares
from shoestring.engine.cuda.tile_loads import gained, load, wrapped

__all__ = ["whole_rows_kernel"]


@triton.jit
def _inputs(first, SLICES: tl.constexpr, SLICE: tl.constexpr):
    """The inputs [SLICES, 1, SLICE] from the first on."""
    return (first + tl.arange(0, SLICES)[:, None] * SLICE + tl.arange(0, SLICE)[None, :])[:, None, :]


@triton.jit
def _rows_of(
    x, gain, k, K: tl.constexpr, EVEN: tl.constexpr, HAS_NORM: tl.constexpr, ADDS_ONE: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Rows' inputs k as a right operand [slices, k, BLOCK_M], and their sums of squares."""
    values = load(x + k, k < K, EVEN, "evict_last")
    squares = tl.zeros((values.shape[1],), tl.float32)
    if HAS_NORM:
        wide = values.to(tl.float32)
        squares = tl.sum(tl.sum(wide * wide, 2), 0)
        values = gained(wide, gain, k, K, EVEN, ADDS_ONE)
    return tl.permute(values.to(COMPUTE), (0, 2, 1)), squares


@triton.jit(do_not_specialize=["rows", "outputs"])
def whole_rows_kernel(
    x, first, second, gain, parts, bias, residual, out, next_gain, next_values, next_squares, rows, outputs,
    x_stride, values_stride, residual_stride, out_stride, next_stride, squares_stride, epsilon,
    K: tl.constexpr, COMPUTE: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr, ADDS_ONE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
    MOST_PARTS: tl.constexpr, LEAVES: tl.constexpr, NEXT_ADDS_ONE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, TAIL: tl.constexpr, PDL: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, tiles of outputs); SLICES * (SLICE + TAIL) inputs or fewer, a tail's (0: none) behind all
    others. The rest is `few_rows_kernel`'s.
    """
    MOST: tl.constexpr = SLICES * SLICE
    EVEN: tl.constexpr = MOST <= K
    TAIL_EVEN: tl.constexpr = SLICES * (SLICE + TAIL) == K
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.minimum(n, outputs - 1)  # rows beyond the last are read as the last, so that loads need no mask
    at = own.to(tl.int64)[None, :, None] * values_stride
    k = _inputs(0, SLICES, SLICE)
    if PDL and not LATE:
        gdc_launch_dependents()
    weights = load(first + at + k, k < K, EVEN, "evict_first")
    if TAIL:
        tail = _inputs(MOST, SLICES, TAIL)
        tail_weights = load(first + at + tail, tail < K, TAIL_EVEN, "evict_first")
    if GATED:
        more = load(second + at + k, k < K, EVEN, "evict_first")
        if TAIL:
            more_tail = load(second + at + tail, tail < K, TAIL_EVEN, "evict_first")
    biases, gains = gains_of(bias, next_gain, n, outputs, HAS_BIAS, LEAVES, NEXT_ADDS_ONE)
    if PDL:
        gdc_wait()
        if LATE:
            gdc_launch_dependents()
    rows_at = x + wrapped(m, rows)[None, :, None] * x_stride
    right, squares = _rows_of(rows_at, gain, k, K, EVEN, HAS_NORM, ADDS_ONE, COMPUTE)
    if TAIL:
        tail_right, tail_squares = _rows_of(rows_at, gain, tail, K, TAIL_EVEN, HAS_NORM, ADDS_ONE, COMPUTE)
        squares += tail_squares
    added = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if HAS_RESIDUAL:
        added = added_to(residual, n, m, rows, outputs, residual_stride)
    if PARTS:
        squares = left_squares(parts, m, rows, squares_stride, PARTS, MOST_PARTS)
    shares = tl.dot(weights, right, input_precision="ieee")
    if TAIL:
        shares = tl.dot(tail_weights, tail_right, shares, input_precision="ieee")
    sums = tl.sum(shares, 0)
    other = sums
    if GATED:
        shares = tl.dot(more, right, input_precision="ieee")
        if TAIL:
            shares = tl.dot(more_tail, tail_right, shares, input_precision="ieee")
        other = tl.sum(shares, 0)
    finish(
        sums, other, squares, biases, added, gains, out, next_values, next_squares, n, m, tl.program_id(1), rows,
        outputs, out_stride, next_stride, squares_stride, epsilon,
        K, GATED, HAS_NORM or PARTS > 0, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, LEAVES,
    )  # fmt: skip
