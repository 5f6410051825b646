"""Triton kernel of the product of one row with a quantised matrix, on the tensor cores.

As in `fragments_kernel`, a thread reads just those bytes that it multiplies. The tensor cores take eight rows at a time;
where there is one, its inputs are eight rows instead: of 256 inputs row j has the j-th group of 32 and is zero elsewhere.
So the sums come out by group, and a thread scales those of two groups only, for all 256 inputs at once.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.fragments_kernel import outputs_of, places
from shoestring.engine.cuda.linear_kernels import left_squares, load_and_finish
from shoestring.engine.cuda.tile_loads import load
from shoestring.engine.cuda.unpack_kernels import halves, ones_like, pairs, spread_nibbles

__all__ = ["fragments_row_kernel"]


@triton.jit
def _begin(
    values, scales, first_n, outputs, values_stride, scales_stride,
    KIND: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Where a program's threads begin to read a matrix: words of levels, and of scales (float16 in int8)."""
    warp, row, neighbour, word = places(2, WARPS)
    n = outputs_of(row, first_n, outputs, TILES, WHOLE).to(tl.int64)
    at = n * (values_stride // 4) + warp * (BLOCKS * 8 * KIND) + 2 * neighbour + word
    values = tl.max_contiguous(values.to(tl.pointer_type(tl.int32)) + at, [1, 1, 1, 2])
    # Of four chunks of 64 inputs each neighbour reads the scales of one: two groups, of whose sums it has some.
    warp, row, neighbour, word = places(2, WARPS)
    n = outputs_of(row, first_n, outputs, TILES, WHOLE)
    at = 2 * ((warp * (4 * BLOCKS) + neighbour) * scales_stride + n) + word
    scales = scales.to(tl.pointer_type(tl.float16 if KIND == 8 else tl.int32)) + at
    return values, tl.max_contiguous(scales, [1, 1, 1, 2])


@triton.jit
def _fetch(
    values, scales, trip, scales_stride,
    KIND: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """What a trip needs of a matrix, as threads have it: words of even and odd groups (of int4 the same), and scales."""
    warp, _, neighbour, _ = places(2, WARPS)
    share = tl.arange(0, 4 * BLOCKS)[None, None, :, None]
    chunk = (trip * WARPS + warp) * (4 * BLOCKS) + share
    values = values + trip * (WARPS * BLOCKS * 8 * KIND) + share * (2 * KIND)
    even = load(values, chunk * 64 < K, EVEN, "evict_first")
    odd = even
    if KIND == 8:
        odd = load(values + 8, chunk * 64 + 32 < K, EVEN, "evict_first")
    share = tl.arange(0, BLOCKS)[None, None, :, None]
    chunk = ((trip * WARPS + warp) * BLOCKS + share) * 4 + neighbour
    scales += 2 * (trip * (WARPS * BLOCKS * 4) * scales_stride + share * (4 * scales_stride))
    return even, odd, load(scales, chunk * 64 < K, EVEN, "evict_first")


@triton.jit
def _left(levels, TILES: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr):
    """Levels as `spread_nibbles` has them, [TILES, 2, BLOCKS, 4, WARPS, 8, 4, 2, 2, 2], as left operands [.., 16, 128]."""
    parts = tl.permute(levels, (0, 2, 4, 1, 5, 3, 7, 6, 8, 9))
    return tl.reshape(parts, [TILES * BLOCKS * WARPS, 16, 128])


@triton.jit
def _inputs(x, trip, K: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr):
    """The inputs of a trip, two in a word, each group with the threads that have its sums: [BLOCKS, WARPS, 8, 4, 2, 2].

    They are in the left operands' order.
    """
    warp, group, neighbour, word = places(4, WARPS)
    block = (trip * WARPS + warp) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    at = tl.max_contiguous(block * 128 + group * 16 + neighbour * 4 + word, [1, 4])
    words = load(x.to(tl.pointer_type(tl.uint32)) + at, block * 256 + group * 32 < K, EVEN, "evict_last")
    first, second = tl.split(tl.reshape(words, [BLOCKS, WARPS, 8, 4, 2, 2]))
    return tl.join((first & 0xFFFF) | (second << 16), (first >> 16) | (second & 0xFFFF0000))


@triton.jit
def _right(
    words, ODD: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Right operands [.., 128, 8] for the even or odd groups of 256 inputs: each column has one group, or none of these."""
    group = tl.arange(0, 8)[None, None, None, :, None, None, None]
    chunk = tl.arange(0, 4)[None, None, :, None, None, None, None]
    words = tl.where(group == 2 * chunk + ODD, tl.reshape(words, [BLOCKS, WARPS, 1, 8, 4, 2, 2]), 0)
    parts = tl.permute(pairs(words, COMPUTE), (0, 1, 2, 5, 4, 6, 7, 3))
    parts = tl.reshape(parts, [1, BLOCKS * WARPS, 128, 8])
    parts = tl.broadcast_to(parts, [TILES, BLOCKS * WARPS, 128, 8])
    return tl.reshape(parts, [TILES * BLOCKS * WARPS, 128, 8])


@triton.jit
def _of_groups(numbers, TILES: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr):
    """A number for each output and group [TILES, 2, BLOCKS, WARPS, 8, 4, 2] beside its sum [.., 16, 8]."""
    return tl.reshape(tl.permute(numbers, (0, 2, 3, 1, 4, 5, 6)), [TILES * BLOCKS * WARPS, 16, 8])


@triton.jit
def _multiplied(
    sums, even_words, odd_words, scales, even, odd, inputs_sum,
    KIND: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr, COMPUTE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The sums and a trip's products."""
    even_words = tl.reshape(even_words, [TILES, 2, BLOCKS, 4, WARPS, 8, 4, 2])
    low, high, offset = spread_nibbles(even_words, KIND, COMPUTE, PTX)
    low, high = _left(low, TILES, BLOCKS, WARPS), _left(high, TILES, BLOCKS, WARPS)
    scales = tl.reshape(scales, [TILES, 2, BLOCKS, WARPS, 8, 4, 2])
    if KIND == 8:
        part = tl.dot(high, even, tl.dot(low, even))
        odd_words = tl.reshape(odd_words, [TILES, 2, BLOCKS, 4, WARPS, 8, 4, 2])
        low, high, offset = spread_nibbles(odd_words, KIND, COMPUTE, PTX)
        low, high = _left(low, TILES, BLOCKS, WARPS), _left(high, TILES, BLOCKS, WARPS)
        part = tl.dot(high, odd, tl.dot(low, odd, part))
        sums += _of_groups(scales.to(tl.float32), TILES, BLOCKS, WARPS) * (part - offset * inputs_sum)
    else:
        part = tl.dot(high, odd, tl.dot(low, even))
        scale, minimum = halves(scales)
        sums += _of_groups(scale, TILES, BLOCKS, WARPS) * part
        sums += _of_groups(minimum - offset * scale, TILES, BLOCKS, WARPS) * inputs_sum
    return sums


@triton.jit
def _joined(sums, TILES: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr):
    """All shares' sums of a program's outputs [BLOCK_N, 1]."""
    sums = tl.permute(tl.reshape(sums, [TILES, BLOCKS * WARPS, 16, 8]), (0, 2, 1, 3))
    return tl.sum(tl.reshape(sums, [TILES * 16, BLOCKS * WARPS * 8]), 1)[:, None]


@triton.jit(do_not_specialize=["rows", "outputs"])
def fragments_row_kernel(
    x, first, first_scales, second, second_scales, parts, bias, residual, out, next_gain, next_values, next_squares,
    rows, outputs, x_stride, values_stride, scales_stride, residual_stride, out_stride, next_stride, squares_stride,
    epsilon,
    K: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, MOST_PARTS: tl.constexpr,
    LEAVES: tl.constexpr, NEXT_ADDS_ONE: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
    WHOLE: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Grid (1, tiles of 16 * TILES outputs). The row x is of the type COMPUTE; the rest is `few_rows_kernel`'s."""
    TRIPS: tl.constexpr = (K + 256 * BLOCKS * WARPS - 1) // (256 * BLOCKS * WARPS)
    EVEN: tl.constexpr = K == 256 * BLOCKS * WARPS * TRIPS
    first_n = tl.program_id(1) * (16 * TILES)
    if PDL and not LATE:
        gdc_launch_dependents()
    first, first_scales = _begin(
        first, first_scales, first_n, outputs, values_stride, scales_stride, KIND, TILES, BLOCKS, WARPS, WHOLE
    )
    if GATED:
        second, second_scales = _begin(
            second, second_scales, first_n, outputs, values_stride, scales_stride, KIND, TILES, BLOCKS, WARPS, WHOLE
        )  # fmt: skip
    if AHEAD:
        even_words, odd_words, scales = _fetch(
            first, first_scales, 0, scales_stride, KIND, K, EVEN, BLOCKS, WARPS
        )
        if GATED:
            more_even, more_odd, more_scales = _fetch(
                second, second_scales, 0, scales_stride, KIND, K, EVEN, BLOCKS, WARPS
            )
    if PDL:
        gdc_wait()
        if LATE:
            gdc_launch_dependents()
    n = first_n + tl.arange(0, 16 * TILES)
    m = tl.arange(0, 1)
    squares = tl.zeros((1,), tl.float32)
    if PARTS:
        squares = left_squares(parts, m, 1, squares_stride, PARTS, MOST_PARTS)
    sums = tl.zeros((TILES * BLOCKS * WARPS, 16, 8), tl.float32)
    other = tl.zeros((TILES * BLOCKS * WARPS, 16, 8), tl.float32)
    for trip in tl.range(0, TRIPS, num_stages=1, loop_unroll_factor=UNROLL):
        if not AHEAD:
            even_words, odd_words, scales = _fetch(
                first, first_scales, trip, scales_stride, KIND, K, EVEN, BLOCKS, WARPS
            )
            if GATED:
                more_even, more_odd, more_scales = _fetch(
                    second, second_scales, trip, scales_stride, KIND, K, EVEN, BLOCKS, WARPS
                )
        inputs = _inputs(x, trip, K, EVEN, BLOCKS, WARPS)
        even = _right(inputs, 0, TILES, BLOCKS, WARPS, COMPUTE)
        odd = _right(inputs, 1, TILES, BLOCKS, WARPS, COMPUTE)
        shaped = tl.reshape(even_words, [TILES, 2, BLOCKS, 4, WARPS, 8, 4, 2])
        ones = _left(ones_like(shaped, COMPUTE, PTX), TILES, BLOCKS, WARPS)
        inputs_sum = tl.dot(ones, odd, tl.dot(ones, even))
        behind = tl.minimum(trip + 1, TRIPS - 1)
        if AHEAD and TRIPS > 1:
            next_even, next_odd, next_scales = _fetch(
                first, first_scales, behind, scales_stride, KIND, K, EVEN, BLOCKS, WARPS
            )
        sums = _multiplied(
            sums, even_words, odd_words, scales, even, odd, inputs_sum,
            KIND, TILES, BLOCKS, WARPS, COMPUTE, PTX,
        )  # fmt: skip
        if AHEAD and TRIPS > 1:
            even_words, odd_words, scales = next_even, next_odd, next_scales
        if GATED:
            if AHEAD and TRIPS > 1:
                next_even, next_odd, next_scales = _fetch(
                    second, second_scales, behind, scales_stride, KIND, K, EVEN, BLOCKS, WARPS
                )
            other = _multiplied(
                other, more_even, more_odd, more_scales, even, odd, inputs_sum,
                KIND, TILES, BLOCKS, WARPS, COMPUTE, PTX,
            )  # fmt: skip
            if AHEAD and TRIPS > 1:
                more_even, more_odd, more_scales = next_even, next_odd, next_scales
    total = _joined(sums, TILES, BLOCKS, WARPS)
    second_total = total
    if GATED:
        second_total = _joined(other, TILES, BLOCKS, WARPS)
    load_and_finish(
        total, second_total, squares, parts, bias, residual, out, next_gain, next_values, next_squares, n, m, 1,
        outputs, residual_stride, out_stride, next_stride, squares_stride, epsilon,
        K, GATED, PARTS > 0, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, 0, 1, LEAVES, NEXT_ADDS_ONE,
    )  # fmt: skip
