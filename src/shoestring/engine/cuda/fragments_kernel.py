"""Triton kernel of the products of a few rows with a quantised matrix: from memory into the tensor cores' registers.

A thread reads just those bytes that it multiplies. Four neighbours read 32 bytes of a row between them, one group in int8
and two in int4, and what each of them has is its part of the tensor cores' left operand once the inputs are taken in
another order, in which the rows are then read as well. So nothing passes through shared memory, and no warp waits for
another before the end. The warps of a program share out the inputs, CHUNKS of 64 each at a time, and the next ones' weights
are on the way meanwhile.

A weight enters as the integer that it is, without a conversion: four of its bits become the last ones of 128 (bfloat16) or
1024 (float16), of int8 twice. What is too much by that is taken off by the sums of the inputs, as int4's minima are added.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.linear_kernels import left_squares, load_and_finish
from shoestring.engine.cuda.tile_loads import load, wrapped
from shoestring.engine.cuda.unpack_kernels import halves, ones_like, pairs, spread_nibbles

__all__ = ["fragments_kernel", "outputs_of", "places"]


@triton.jit
def places(EACH: tl.constexpr, WARPS: tl.constexpr):
    """For each of a program's threads and each of EACH things that it reads side by side, in one dimension, which is how
    they come to lie so: the warp, the thread's row of eight, its place among four neighbours, and the thing.
    """
    place = tl.arange(0, 32 * EACH * WARPS)
    return place // (32 * EACH), place // (4 * EACH) % 8, place // EACH % 4, place % EACH


@triton.jit
def outputs_of(row, first_n, outputs, TILES: tl.constexpr, WHOLE: tl.constexpr):
    """The outputs [TILES, 2, 1, places] of a program's threads."""
    tile = (tl.arange(0, TILES) * 16)[:, None, None, None] + (tl.arange(0, 2) * 8)[None, :, None, None]
    n = first_n + tile + row
    if not WHOLE:  # rows beyond the last are read as the last, so that loads need no mask
        n = tl.minimum(n, outputs - 1)
    return n


@triton.jit
def _begin(
    values, scales, first_n, outputs, values_stride, scales_stride,
    KIND: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Where a program's threads begin to read a matrix: words of levels, and of scales (float16 in int8)."""
    warp, row, neighbour, word = places(2, WARPS)
    n = outputs_of(row, first_n, outputs, TILES, WHOLE).to(tl.int64)
    at = n * (values_stride // 4) + warp * (CHUNKS * 2 * KIND) + 2 * neighbour + word
    values = tl.max_contiguous(values.to(tl.pointer_type(tl.int32)) + at, [1, 1, 1, 2])
    # Neighbours read the same scales: those of the outputs that they will have sums of.
    warp, row, neighbour, word = places(2, WARPS)
    n = outputs_of(row, first_n, outputs, TILES, WHOLE)
    at = 2 * (warp * (CHUNKS * scales_stride) + n) + word
    scales = scales.to(tl.pointer_type(tl.float16 if KIND == 8 else tl.int32)) + at
    return values, tl.max_contiguous(scales, [1, 1, 1, 2])


@triton.jit
def _fetch(
    values, scales, trip, scales_stride,
    KIND: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """What a trip needs of a matrix, as threads have it: words of even and odd groups (of int4 the same), and scales."""
    share = tl.arange(0, CHUNKS)[None, None, :, None]
    warp, _, _, _ = places(2, WARPS)
    chunk = (trip * WARPS + warp) * CHUNKS + share
    values = values + trip * (WARPS * CHUNKS * 2 * KIND) + share * (2 * KIND)
    even = load(values, chunk * 64 < K, EVEN, "evict_first")
    odd = even
    if KIND == 8:
        odd = load(values + 8, chunk * 64 + 32 < K, EVEN, "evict_first")
    scales += 2 * (trip * (WARPS * CHUNKS) * scales_stride + share * scales_stride)
    return even, odd, load(scales, chunk * 64 < K, EVEN, "evict_first")


@triton.jit
def _left(levels, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """Levels as `spread_nibbles` has them [TILES, 2, CHUNKS, WARPS, 8, 4, 2, 2, 2] as left operands [.., 16, 32]."""
    parts = tl.permute(levels, (0, 2, 3, 1, 4, 6, 5, 7, 8))
    return tl.reshape(parts, [TILES * CHUNKS * WARPS, 16, 32])


@triton.jit
def _begin_rows(x, first_m, rows, x_stride, CHUNKS: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a program's threads begin to read rows: words of two inputs."""
    warp, row, neighbour, word = places(4, WARPS)
    m = wrapped(first_m + (tl.arange(0, BLOCK_M // 8) * 8)[:, None, None] + row, rows)
    at = m * (x_stride // 2) + warp * (CHUNKS * 32) + 4 * neighbour + word
    return tl.max_contiguous(x.to(tl.pointer_type(tl.int32)) + at, [1, 1, 4])


@triton.jit
def _right(
    x, trip, ODD: tl.constexpr,
    K: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A group's inputs of the rows as right operands [.., 32, BLOCK_M], in the order of `_left`."""
    share = tl.arange(0, CHUNKS)[None, :, None]
    warp, _, _, _ = places(4, WARPS)
    chunk = (trip * WARPS + warp) * CHUNKS + share
    at = x + trip * (WARPS * CHUNKS * 32) + (share * 32 + ODD * 16)
    words = load(at, chunk * 64 + ODD * 32 < K, EVEN, "evict_last")
    parts = tl.reshape(pairs(words, COMPUTE), [1, BLOCK_M // 8, CHUNKS, WARPS, 8, 4, 2, 2, 2])
    parts = tl.permute(parts, (0, 2, 3, 6, 5, 8, 7, 1, 4))
    parts = tl.reshape(parts, [1, CHUNKS * WARPS, 32, BLOCK_M])
    parts = tl.broadcast_to(parts, [TILES, CHUNKS * WARPS, 32, BLOCK_M])
    return tl.reshape(parts, [TILES * CHUNKS * WARPS, 32, BLOCK_M])


@triton.jit
def _of_outputs(
    numbers, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """A number for each output [TILES, 2, CHUNKS, WARPS, 8, 4] beside its sums [.., 16, BLOCK_M]."""
    parts = tl.reshape(numbers, [TILES, 2, CHUNKS, WARPS, 8, 1, 4, 1])
    parts = tl.permute(parts, (0, 2, 3, 1, 4, 5, 6, 7))
    parts = tl.broadcast_to(parts, [TILES, CHUNKS, WARPS, 2, 8, BLOCK_M // 8, 4, 2])
    return tl.reshape(parts, [TILES * CHUNKS * WARPS, 16, BLOCK_M])


@triton.jit
def _multiplied(
    sums, even_words, odd_words, scales, even, odd, even_sum, odd_sum,
    KIND: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr,
    COMPUTE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The sums and a trip's products."""
    even_words = tl.reshape(even_words, [TILES, 2, CHUNKS, WARPS, 8, 4, 2])
    first, second = tl.split(tl.reshape(scales, [TILES, 2, CHUNKS, WARPS, 8, 4, 2]))
    low, high, offset = spread_nibbles(even_words, KIND, COMPUTE, PTX)
    low, high = _left(low, TILES, CHUNKS, WARPS), _left(high, TILES, CHUNKS, WARPS)
    if KIND == 8:
        scale = _of_outputs(first.to(tl.float32), TILES, CHUNKS, WARPS, BLOCK_M)
        sums += scale * (tl.dot(high, even, tl.dot(low, even)) - offset * even_sum)
        odd_words = tl.reshape(odd_words, [TILES, 2, CHUNKS, WARPS, 8, 4, 2])
        low, high, offset = spread_nibbles(odd_words, KIND, COMPUTE, PTX)
        low, high = _left(low, TILES, CHUNKS, WARPS), _left(high, TILES, CHUNKS, WARPS)
        scale = _of_outputs(second.to(tl.float32), TILES, CHUNKS, WARPS, BLOCK_M)
        sums += scale * (tl.dot(high, odd, tl.dot(low, odd)) - offset * odd_sum)
    else:
        scale, minimum = halves(first)
        minimum = _of_outputs(minimum - offset * scale, TILES, CHUNKS, WARPS, BLOCK_M)
        scale = _of_outputs(scale, TILES, CHUNKS, WARPS, BLOCK_M)
        sums += scale * tl.dot(low, even)
        sums += minimum * even_sum
        scale, minimum = halves(second)
        minimum = _of_outputs(minimum - offset * scale, TILES, CHUNKS, WARPS, BLOCK_M)
        scale = _of_outputs(scale, TILES, CHUNKS, WARPS, BLOCK_M)
        sums += scale * tl.dot(high, odd)
        sums += minimum * odd_sum
    return sums


@triton.jit
def _joined(sums, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """All shares' sums of a program's outputs [BLOCK_N, BLOCK_M]."""
    sums = tl.sum(tl.reshape(sums, [TILES, CHUNKS, WARPS, 16, BLOCK_M]), 1)
    return tl.reshape(tl.sum(sums, 1), [TILES * 16, BLOCK_M])


@triton.jit(do_not_specialize=["rows", "outputs"])
def fragments_kernel(
    x, first, first_scales, second, second_scales, parts, bias, residual, out, next_gain, next_values, next_squares,
    rows, outputs, x_stride, values_stride, scales_stride, residual_stride, out_stride, next_stride, squares_stride,
    epsilon,
    K: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, MOST_PARTS: tl.constexpr,
    LEAVES: tl.constexpr, NEXT_ADDS_ONE: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
    CHUNKS: tl.constexpr, WARPS: tl.constexpr, WHOLE: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr, LATE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, tiles of 16 * TILES outputs). Rows x are of COMPUTE's type; the rest is `few_rows_kernel`'s."""
    TRIPS: tl.constexpr = (K + 64 * CHUNKS * WARPS - 1) // (64 * CHUNKS * WARPS)
    EVEN: tl.constexpr = K == 64 * CHUNKS * WARPS * TRIPS
    BATCH: tl.constexpr = TILES * CHUNKS * WARPS
    first_n = tl.program_id(1) * (16 * TILES)
    first_m = tl.program_id(0) * BLOCK_M
    if PDL and not LATE:
        gdc_launch_dependents()
    first, first_scales = _begin(
        first, first_scales, first_n, outputs, values_stride, scales_stride, KIND, TILES, CHUNKS, WARPS, WHOLE
    )
    if GATED:
        second, second_scales = _begin(
            second, second_scales, first_n, outputs, values_stride, scales_stride, KIND, TILES, CHUNKS, WARPS, WHOLE
        )  # fmt: skip
    if AHEAD:
        even_words, odd_words, scales = _fetch(
            first, first_scales, 0, scales_stride, KIND, K, EVEN, CHUNKS, WARPS
        )
        if GATED:
            more_even, more_odd, more_scales = _fetch(
                second, second_scales, 0, scales_stride, KIND, K, EVEN, CHUNKS, WARPS
            )
    if PDL:
        gdc_wait()
        if LATE:
            gdc_launch_dependents()
    m = first_m + tl.arange(0, BLOCK_M)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    if PARTS:
        squares = left_squares(parts, m, rows, squares_stride, PARTS, MOST_PARTS)
    x = _begin_rows(x, first_m, rows, x_stride, CHUNKS, WARPS, BLOCK_M)
    sums = tl.zeros((BATCH, 16, BLOCK_M), tl.float32)
    other = tl.zeros((BATCH, 16, BLOCK_M), tl.float32)
    for trip in tl.range(0, TRIPS, num_stages=1, loop_unroll_factor=UNROLL):
        if not AHEAD:
            even_words, odd_words, scales = _fetch(
                first, first_scales, trip, scales_stride, KIND, K, EVEN, CHUNKS, WARPS
            )
            if GATED:
                more_even, more_odd, more_scales = _fetch(
                    second, second_scales, trip, scales_stride, KIND, K, EVEN, CHUNKS, WARPS
                )
        even = _right(x, trip, 0, K, EVEN, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE)
        odd = _right(x, trip, 1, K, EVEN, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE)
        shaped = tl.reshape(even_words, [TILES, 2, CHUNKS, WARPS, 8, 4, 2])
        ones = _left(ones_like(shaped, COMPUTE, PTX), TILES, CHUNKS, WARPS)
        even_sum = tl.dot(ones, even)
        odd_sum = tl.dot(ones, odd)
        behind = tl.minimum(trip + 1, TRIPS - 1)
        if AHEAD and TRIPS > 1:
            next_even, next_odd, next_scales = _fetch(
                first, first_scales, behind, scales_stride, KIND, K, EVEN, CHUNKS, WARPS
            )
        sums = _multiplied(
            sums, even_words, odd_words, scales, even, odd, even_sum, odd_sum,
            KIND, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE, PTX,
        )  # fmt: skip
        if AHEAD and TRIPS > 1:
            even_words, odd_words, scales = next_even, next_odd, next_scales
        if GATED:
            if AHEAD and TRIPS > 1:
                next_even, next_odd, next_scales = _fetch(
                    second, second_scales, behind, scales_stride, KIND, K, EVEN, CHUNKS, WARPS
                )
            other = _multiplied(
                other, more_even, more_odd, more_scales, even, odd, even_sum, odd_sum,
                KIND, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE, PTX,
            )  # fmt: skip
            if AHEAD and TRIPS > 1:
                more_even, more_odd, more_scales = next_even, next_odd, next_scales
    n = first_n + tl.arange(0, 16 * TILES)
    total = _joined(sums, TILES, CHUNKS, WARPS, BLOCK_M)
    second_total = total
    if GATED:
        second_total = _joined(other, TILES, CHUNKS, WARPS, BLOCK_M)
    load_and_finish(
        total, second_total, squares, parts, bias, residual, out, next_gain, next_values, next_squares, n, m, rows,
        outputs, residual_stride, out_stride, next_stride, squares_stride, epsilon,
        K, GATED, PARTS > 0, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, 0, 1, LEAVES, NEXT_ADDS_ONE,
    )  # fmt: skip
