"""How the products' kernels read: weights and rows with or without a mask, an RMSNorm's gain, lines ahead of time."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

__all__ = ["gained", "load", "pairs_of_x", "places", "prefetch", "rows_of_x", "wrapped"]


@triton.jit
def load(pointer, inside, EVEN: tl.constexpr, POLICY: tl.constexpr):
    """Values, zeros outside; EVEN: all are inside."""
    if EVEN:
        values = tl.load(pointer, eviction_policy=POLICY)
    else:
        values = tl.load(pointer, mask=inside, other=0, eviction_policy=POLICY)
    return values


@triton.jit
def wrapped(m, rows):
    """The row to read for row m: rows beyond the last are read as the first ones, so that loads need no mask.

    Not all as the last one: every program would ask the L2 cache for the same lines, which took longer than other rows.
    """
    return m % rows


@triton.jit
def gained(values, gain, k, K: tl.constexpr, EVEN: tl.constexpr, ADDS_ONE: tl.constexpr):
    """Inputs [.., k] times an RMSNorm's gain, in float32."""
    gains = load(gain + k, k < K, EVEN, "evict_last").to(tl.float32)
    if ADDS_ONE:
        gains += 1.0
    return values.to(tl.float32) * gains


@triton.jit
def prefetch(values, row_bytes, first_byte, n, ROW_BYTES: tl.constexpr, LINES: tl.constexpr):
    """Ask for lines of 128 bytes of some rows, as far as the L2 cache."""
    rows = values.to(tl.int64) + n.to(tl.int64) * row_bytes
    at = rows[:, None] + tl.minimum(first_byte + tl.arange(0, LINES) * 128, ROW_BYTES - 1)[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, False, 1)


@triton.jit
def rows_of_x(
    x, gain, squares, k, K: tl.constexpr, EVEN: tl.constexpr, HAS_NORM: tl.constexpr, ADDS_ONE: tl.constexpr,
    COMPUTE: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """A tile of rows [BLOCK_M, k] to multiply with, and the sums of squares so far."""
    values = load(x + k[None, :], (k < K)[None, :], EVEN, POLICY)
    if HAS_NORM:
        wide = values.to(tl.float32)
        squares += wide * wide
        values = gained(wide, gain, k[None, :], K, EVEN, ADDS_ONE)
    return values.to(COMPUTE), squares


@triton.jit
def pairs_of_x(
    x, gain, squares, k, K: tl.constexpr, EVEN: tl.constexpr, HAS_NORM: tl.constexpr, ADDS_ONE: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Inputs k and those 32 on, as right operands [k, BLOCK_M], and the sums of squares so far."""
    tile, squares = rows_of_x(x, gain, squares, k, K, EVEN, HAS_NORM, ADDS_ONE, COMPUTE, "evict_last")
    even = tl.trans(tile)
    tile, squares = rows_of_x(x, gain, squares, k + 32, K, EVEN, HAS_NORM, ADDS_ONE, COMPUTE, "evict_last")
    return even, tl.trans(tile), squares


@triton.jit
def places(EACH: tl.constexpr, WARPS: tl.constexpr):
    """For each of a program's threads and each of EACH things that it reads side by side, in one dimension, which is how
    they come to lie so: the warp, the thread's row of eight, its place among four neighbours, and the thing.
    """
    place = tl.arange(0, 32 * EACH * WARPS)
    return place // (32 * EACH), place // (4 * EACH) % 8, place // EACH % 4, place % EACH
