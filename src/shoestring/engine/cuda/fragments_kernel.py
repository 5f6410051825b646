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

from shoestring.engine.cuda.fragments_of_a_row import joined_row, multiplied_row, operands_of_row
from shoestring.engine.cuda.fragments_of_rows import begin_rows, joined, multiplied, operands
from shoestring.engine.cuda.linear_kernels import left_squares, load_and_finish
from shoestring.engine.cuda.tile_loads import load, places

__all__ = ["fragments_kernel"]


@triton.jit
def _outputs_of(row, first_n, outputs, TILES: tl.constexpr, WHOLE: tl.constexpr):
    """The outputs [TILES, 2, 1, places] of a program's threads."""
    tile = (tl.arange(0, TILES) * 16)[:, None, None, None] + (tl.arange(0, 2) * 8)[None, :, None, None]
    n = first_n + tile + row
    if not WHOLE:  # rows beyond the last are read as the last, so that loads need no mask
        n = tl.minimum(n, outputs - 1)
    return n


@triton.jit
def _begin(
    values, scales, first_n, outputs, values_stride, scales_stride, ROW: tl.constexpr,
    KIND: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Where a program's threads begin to read a matrix: words of levels, and of scales (float16 in int8)."""
    warp, row, neighbour, word = places(2, WARPS)
    n = _outputs_of(row, first_n, outputs, TILES, WHOLE).to(tl.int64)
    at = n * (values_stride // 4) + warp * (CHUNKS * 2 * KIND) + 2 * neighbour + word
    values = tl.max_contiguous(values.to(tl.pointer_type(tl.int32)) + at, [1, 1, 1, 2])
    # A thread's scales are those of the sums that it will have: of one row, of one of four chunks of 64 inputs (each
    # neighbour another); of several, of all chunks (neighbours read the same).
    warp, row, neighbour, word = places(2, WARPS)
    n = _outputs_of(row, first_n, outputs, TILES, WHOLE)
    if ROW:
        at = 2 * ((warp * CHUNKS + neighbour) * scales_stride + n) + word
    else:
        at = 2 * (warp * (CHUNKS * scales_stride) + n) + word
    scales = scales.to(tl.pointer_type(tl.float16 if KIND == 8 else tl.int32)) + at
    return values, tl.max_contiguous(scales, [1, 1, 1, 2])


@triton.jit
def _fetch(
    values, scales, trip, scales_stride, ROW: tl.constexpr,
    KIND: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """What a trip needs of a matrix, as threads have it: words of even and odd groups (of int4 the same), and scales."""
    share = tl.arange(0, CHUNKS)[None, None, :, None]
    warp, _, neighbour, _ = places(2, WARPS)
    chunk = (trip * WARPS + warp) * CHUNKS + share
    values = values + trip * (WARPS * CHUNKS * 2 * KIND) + share * (2 * KIND)
    even = load(values, chunk * 64 < K, EVEN, "evict_first")
    odd = even
    if KIND == 8:
        odd = load(values + 8, chunk * 64 + 32 < K, EVEN, "evict_first")
    if ROW:
        share = tl.arange(0, CHUNKS // 4)[None, None, :, None] * 4
        chunk = (trip * WARPS + warp) * CHUNKS + share + neighbour
    scales += 2 * (trip * (WARPS * CHUNKS) * scales_stride + share * scales_stride)
    return even, odd, load(scales, chunk * 64 < K, EVEN, "evict_first")


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
    """Grid (tiles of rows, tiles of 16 * TILES outputs). Rows x are of COMPUTE's type; the rest is `few_rows_kernel`'s.

    With BLOCK_M = 1 there is one row, and CHUNKS is a multiple of 4.
    """
    ROW: tl.constexpr = BLOCK_M == 1
    COLUMNS: tl.constexpr = 8 if ROW else BLOCK_M
    TRIPS: tl.constexpr = (K + 64 * CHUNKS * WARPS - 1) // (64 * CHUNKS * WARPS)
    EVEN: tl.constexpr = K == 64 * CHUNKS * WARPS * TRIPS
    BATCH: tl.constexpr = TILES * (CHUNKS // 4 if ROW else CHUNKS) * WARPS
    first_n = tl.program_id(1) * (16 * TILES)
    first_m = tl.program_id(0) * BLOCK_M
    if ROW:
        first_m, rows = 0, 1
    if PDL and not LATE:
        gdc_launch_dependents()
    first, first_scales = _begin(
        first,
        first_scales,
        first_n,
        outputs,
        values_stride,
        scales_stride,
        ROW,
        KIND,
        TILES,
        CHUNKS,
        WARPS,
        WHOLE,
    )
    if GATED:
        second, second_scales = _begin(
            second, second_scales, first_n, outputs, values_stride, scales_stride, ROW, KIND, TILES, CHUNKS, WARPS, WHOLE
        )  # fmt: skip
    if AHEAD:
        even_words, odd_words, scales = _fetch(
            first, first_scales, 0, scales_stride, ROW, KIND, K, EVEN, CHUNKS, WARPS
        )
        if GATED:
            more_even, more_odd, more_scales = _fetch(
                second, second_scales, 0, scales_stride, ROW, KIND, K, EVEN, CHUNKS, WARPS
            )
    if PDL:
        gdc_wait()
        if LATE:
            gdc_launch_dependents()
    m = first_m + tl.arange(0, BLOCK_M)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    if PARTS:
        squares = left_squares(parts, m, rows, squares_stride, PARTS, MOST_PARTS)
    if not ROW:
        x = begin_rows(x, first_m, rows, x_stride, CHUNKS, WARPS, BLOCK_M)
    sums = tl.zeros((BATCH, 16, COLUMNS), tl.float32)
    other = tl.zeros((BATCH, 16, COLUMNS), tl.float32)
    for trip in tl.range(0, TRIPS, num_stages=1, loop_unroll_factor=UNROLL):
        if not AHEAD:
            even_words, odd_words, scales = _fetch(
                first, first_scales, trip, scales_stride, ROW, KIND, K, EVEN, CHUNKS, WARPS
            )
            if GATED:
                more_even, more_odd, more_scales = _fetch(
                    second, second_scales, trip, scales_stride, ROW, KIND, K, EVEN, CHUNKS, WARPS
                )
        if ROW:
            even, odd, even_sum = operands_of_row(
                x, trip, even_words, K, EVEN, TILES, CHUNKS, WARPS, COMPUTE, PTX
            )
        else:
            even, odd, even_sum, odd_sum = operands(
                x, trip, even_words, K, EVEN, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE, PTX
            )
        behind = tl.minimum(trip + 1, TRIPS - 1)
        if AHEAD and TRIPS > 1:
            next_even, next_odd, next_scales = _fetch(
                first, first_scales, behind, scales_stride, ROW, KIND, K, EVEN, CHUNKS, WARPS
            )
        if ROW:
            sums = multiplied_row(
                sums,
                even_words,
                odd_words,
                scales,
                even,
                odd,
                even_sum,
                KIND,
                TILES,
                CHUNKS,
                WARPS,
                COMPUTE,
                PTX,
            )
        else:
            sums = multiplied(
                sums, even_words, odd_words, scales, even, odd, even_sum, odd_sum,
                KIND, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE, PTX,
            )  # fmt: skip
        if AHEAD and TRIPS > 1:
            even_words, odd_words, scales = next_even, next_odd, next_scales
        if GATED:
            if AHEAD and TRIPS > 1:
                next_even, next_odd, next_scales = _fetch(
                    second, second_scales, behind, scales_stride, ROW, KIND, K, EVEN, CHUNKS, WARPS
                )
            if ROW:
                other = multiplied_row(
                    other,
                    more_even,
                    more_odd,
                    more_scales,
                    even,
                    odd,
                    even_sum,
                    KIND,
                    TILES,
                    CHUNKS,
                    WARPS,
                    COMPUTE,
                    PTX,
                )
            else:
                other = multiplied(
                    other, more_even, more_odd, more_scales, even, odd, even_sum, odd_sum,
                    KIND, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE, PTX,
                )  # fmt: skip
            if AHEAD and TRIPS > 1:
                more_even, more_odd, more_scales = next_even, next_odd, next_scales
    n = first_n + tl.arange(0, 16 * TILES)
    if ROW:
        total = joined_row(sums, TILES, CHUNKS, WARPS)
        second_total = joined_row(other, TILES, CHUNKS, WARPS) if GATED else total
    else:
        total = joined(sums, TILES, CHUNKS, WARPS, BLOCK_M)
        second_total = joined(other, TILES, CHUNKS, WARPS, BLOCK_M) if GATED else total
    load_and_finish(
        total, second_total, squares, parts, bias, residual, out, next_gain, next_values, next_squares, n, m, rows,
        outputs, residual_stride, out_stride, next_stride, squares_stride, epsilon,
        K, GATED, PARTS > 0, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, 0, 1, LEAVES, NEXT_ADDS_ONE,
    )  # fmt: skip
