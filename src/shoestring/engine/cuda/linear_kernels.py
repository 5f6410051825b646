"""Triton kernel of the products with 2 to 256 rows, and what it shares with the one for a single row.

`few_rows_kernel` streams a matrix once. Tiles of weights [BLOCK_N, BLOCK_K] are the left operand of the tensor cores and
the rows, padded to BLOCK_M, the right one: few rows are a small side there, at no cost. Quantised weights enter as the
integers that they are, exact in bfloat16, and a group's sum is scaled in float32; or, where many rows leave the tensor
cores no time for a product per group (WRITTEN), rounded to COMPUTE as a dense matrix would have them. An RMSNorm can be
taken on the way: its gain multiplies the inputs as they stream by, the row's own factor the result. Or the product that
made the rows has left them with the gain, and the sums of squares of their parts (PARTS). Shares of a split sum (SPLIT_K)
are added in their order by the program that arrives last, so results do not change from run to run.

KIND is the bits of a quantised weight, 0 for dense ones. PDL: the kernel may start before the one in front has ended, so
nothing but weights is read before `gdc_wait`; LATE: the next one may only start behind that. PTX: "bf16", "fp16" or "", how
integers are unpacked.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.quantized_tiles import add_int4, add_int8, add_written
from shoestring.engine.cuda.tile_loads import load, pairs_of_x, prefetch, rows_of_x, wrapped

__all__ = [
    "activated",
    "added_to",
    "few_rows_kernel",
    "finish",
    "gains_of",
    "left_squares",
    "load_and_finish",
]


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # cannot overflow
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """An activation in float32."""
    if ACTIVATION == "silu":
        x *= _sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        x *= _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def left_squares(parts, m, rows, stride, PARTS: tl.constexpr, MOST: tl.constexpr):
    """Rows' sums of squares [m], from those of their parts that another product left."""
    part = tl.arange(0, MOST)
    inside = (part < PARTS)[:, None] & (m < rows)[None, :]
    return tl.sum(tl.load(parts + part[:, None] * stride + m[None, :], mask=inside, other=0.0), 0)


@triton.jit
def gains_of(
    bias, next_gain, n, outputs, HAS_BIAS: tl.constexpr, LEAVES: tl.constexpr, NEXT_ADDS_ONE: tl.constexpr
):
    """The bias [n] and the next norm's gain [n], which lie there before the step."""
    biases = tl.zeros((n.shape[0],), tl.float32)
    if HAS_BIAS:
        biases = tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    gains = biases
    if LEAVES:
        gains = tl.load(next_gain + n, mask=n < outputs, other=0.0).to(tl.float32)
        if NEXT_ADDS_ONE:
            gains += 1.0
    return biases, gains


@triton.jit
def added_to(residual, n, m, rows, outputs, stride):
    """What a tile's sums are added to."""
    inside = (n < outputs)[:, None] & (m < rows)[None, :]
    return tl.load(residual + m[None, :] * stride + n[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def finish(
    sums, other, squares, biases, added, gains, out, next_values, next_squares, n, m, tile, rows, outputs,
    out_stride, next_stride, squares_stride, epsilon,
    K: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """Write a tile's sums [BLOCK_N, BLOCK_M] with all that belongs to the product.

    LEAVES: also leave the rows times the next norm's gain, and this tile's part of their squares.
    """
    if NORMED:
        factor = tl.rsqrt(squares / K + epsilon)
        sums *= factor[None, :]
        if GATED:
            other *= factor[None, :]
    if HAS_BIAS:
        sums += biases[:, None]
    result = activated(sums, ACTIVATION)
    if GATED:
        result *= other
    inside = (n < outputs)[:, None] & (m < rows)[None, :]
    if HAS_RESIDUAL:
        result += added
    tl.store(out + m[None, :] * out_stride + n[:, None], result.to(out.dtype.element_ty), mask=inside)
    if LEAVES:
        at = next_values + m[None, :] * next_stride + n[:, None]
        tl.store(at, (result * gains[:, None]).to(next_values.dtype.element_ty), mask=inside)
        kept = tl.where(inside, result, 0.0)
        tl.store(next_squares + tile * squares_stride + m, tl.sum(kept * kept, 0), mask=m < rows)


@triton.jit
def load_and_finish(
    sums, other, squares, parts, bias, residual, out, next_gain, next_values, next_squares, n, m, rows, outputs,
    residual_stride, out_stride, next_stride, squares_stride, epsilon,
    K: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, MOST_PARTS: tl.constexpr,
    LEAVES: tl.constexpr, NEXT_ADDS_ONE: tl.constexpr,
):  # fmt: skip
    """`finish`, with what it needs read here: of programs that share a tile only one comes by."""
    if PARTS:
        squares = left_squares(parts, m, rows, squares_stride, PARTS, MOST_PARTS)
    biases, gains = gains_of(bias, next_gain, n, outputs, HAS_BIAS, LEAVES, NEXT_ADDS_ONE)
    added = sums
    if HAS_RESIDUAL:
        added = added_to(residual, n, m, rows, outputs, residual_stride)
    finish(
        sums, other, squares, biases, added, gains, out, next_values, next_squares, n, m, tl.program_id(1), rows,
        outputs, out_stride, next_stride, squares_stride, epsilon,
        K, GATED, HAS_NORM or PARTS > 0, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, LEAVES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "outputs"])
def few_rows_kernel(
    x, first, first_scales, second, second_scales, gain, parts, bias, residual, out, next_gain, next_values,
    next_squares, shares, arrived, x_tiles, first_tiles, second_tiles, rows, outputs,
    x_stride, values_stride, scales_stride, residual_stride, out_stride, next_stride, squares_stride, epsilon,
    K: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr,
    ADDS_ONE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr, MOST_PARTS: tl.constexpr, LEAVES: tl.constexpr, NEXT_ADDS_ONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr, PTX: tl.constexpr,
    WRITTEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, tiles of outputs, SPLIT_K).

    Args:
        x_tiles, first_tiles, second_tiles: descriptors of x's tiles (BLOCK_K wide for dense weights, 64 where WRITTEN)
            and of dense weights [BLOCK_N, BLOCK_K], which Hopper's copy engine then brings, or None.
        shares: float32, for each tile and share BLOCK_N * BLOCK_M sums (twice where GATED) and BLOCK_M sums of squares.
        arrived: int32 for each tile, zero before and after.
        parts: where x has its norm's gain already (PARTS), [PARTS, rows]: the sums of squares of parts of the rows.
        next_gain, next_values, next_squares: what LEAVES reads and writes (`finish`).
    """
    EVEN: tl.constexpr = K % BLOCK_K == 0
    TRIPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EACH: tl.constexpr = (TRIPS + SPLIT_K - 1) // SPLIT_K
    split = tl.program_id(2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.minimum(n, outputs - 1)  # rows beyond the last are read as the last, so that loads need no mask
    first_trip = split * EACH
    last_trip = tl.minimum(first_trip + EACH, TRIPS)
    at = own.to(tl.int64)[:, None] * values_stride
    if PDL:
        if not LATE:
            gdc_launch_dependents()
        if LINES > 0:
            WIDTH: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
            ROW: tl.constexpr = (K + 63) // 64 * 32 if KIND == 4 else K * WIDTH
            TRIP: tl.constexpr = BLOCK_K // 2 if KIND == 4 else BLOCK_K * WIDTH
            prefetch(first, values_stride * WIDTH, first_trip * TRIP, own, ROW, LINES)
            if GATED:
                prefetch(second, values_stride * WIDTH, first_trip * TRIP, own, ROW, LINES)
        gdc_wait()
        if LATE:
            gdc_launch_dependents()

    x += wrapped(m, rows)[:, None] * x_stride
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K if KIND == 0 else 64 if WRITTEN else 32), tl.float32)
    # Stages named here hold for scales as well; as an option of the launch they would hold for the operands only.
    for trip in tl.range(first_trip, last_trip, num_stages=STAGES):
        if first_tiles is not None:
            column = trip * BLOCK_K
            right = tl.trans(x_tiles.load([tl.program_id(0) * BLOCK_M, column]))
            weights = first_tiles.load([tl.program_id(1) * BLOCK_N, column])
            sums = tl.dot(weights, right, sums, input_precision="ieee")
            if GATED:
                weights = second_tiles.load([tl.program_id(1) * BLOCK_N, column])
                other = tl.dot(weights, right, other, input_precision="ieee")
        elif KIND == 0:
            k = trip * BLOCK_K + tl.arange(0, BLOCK_K)
            tile, squares = rows_of_x(x, gain, squares, k, K, EVEN, HAS_NORM, ADDS_ONE, COMPUTE, "evict_last")
            right = tl.trans(tile)
            inside = (k < K)[None, :]
            weights = load(first + at + k[None, :], inside, EVEN, "evict_first")
            sums = tl.dot(weights, right, sums, input_precision="ieee")
            if GATED:
                weights = load(second + at + k[None, :], inside, EVEN, "evict_first")
                other = tl.dot(weights, right, other, input_precision="ieee")
        elif WRITTEN:
            for part in tl.static_range(BLOCK_K // 64):
                chunk = trip * (BLOCK_K // 64) + part
                if x_tiles is not None:
                    tile = x_tiles.load([tl.program_id(0) * BLOCK_M, chunk * 64])
                else:
                    k = chunk * 64 + tl.arange(0, 64)
                    tile, squares = rows_of_x(
                        x, gain, squares, k, K, EVEN, HAS_NORM, ADDS_ONE, COMPUTE, "evict_last"
                    )
                right = tl.trans(tile)
                sums = add_written(
                    sums, first + at, first_scales, own, chunk, scales_stride, right, K, KIND, EVEN, COMPUTE, PTX
                )  # fmt: skip
                if GATED:
                    other = add_written(
                        other, second + at, second_scales, own, chunk, scales_stride, right, K, KIND, EVEN, COMPUTE, PTX
                    )  # fmt: skip
        else:
            for part in tl.static_range(BLOCK_K // 64):
                chunk = trip * (BLOCK_K // 64) + part
                k = chunk * 64 + tl.arange(0, 32)
                even, odd, squares = pairs_of_x(x, gain, squares, k, K, EVEN, HAS_NORM, ADDS_ONE, COMPUTE)
                if KIND == 8:
                    sums = add_int8(
                        sums, first + at, first_scales, own, chunk, scales_stride, even, odd, K, EVEN, COMPUTE
                    )
                    if GATED:
                        other = add_int8(
                            other, second + at, second_scales, own, chunk, scales_stride, even, odd, K, EVEN, COMPUTE
                        )  # fmt: skip
                else:
                    # The tensor cores sum the inputs, for the minima: the sums come out where they are needed. Few
                    # rows are loaded anew (another policy keeps the two apart), laid out for this product; many are
                    # on the way to the L2 cache's limit.
                    ones = tl.full((BLOCK_N, 32), 1.0, COMPUTE)
                    if BLOCK_M < 32:
                        tile, _ = rows_of_x(x, gain, squares, k, K, EVEN, HAS_NORM, ADDS_ONE, COMPUTE, "")
                        even_sum = tl.dot(ones, tl.trans(tile), input_precision="ieee")
                        tile, _ = rows_of_x(
                            x, gain, squares, k + 32, K, EVEN, HAS_NORM, ADDS_ONE, COMPUTE, ""
                        )
                        odd_sum = tl.dot(ones, tl.trans(tile), input_precision="ieee")
                    else:
                        even_sum = tl.dot(ones, even, input_precision="ieee")
                        odd_sum = tl.dot(ones, odd, input_precision="ieee")
                    sums = add_int4(
                        sums, first + at, first_scales, own, chunk, scales_stride, even, odd, even_sum, odd_sum,
                        K, EVEN, COMPUTE, PTX,
                    )  # fmt: skip
                    if GATED:
                        other = add_int4(
                            other, second + at, second_scales, own, chunk, scales_stride, even, odd, even_sum,
                            odd_sum, K, EVEN, COMPUTE, PTX,
                        )  # fmt: skip

    squares = tl.sum(squares, 1)
    if SPLIT_K == 1:
        load_and_finish(
            sums, other, squares, parts, bias, residual, out, next_gain, next_values, next_squares, n, m, rows, outputs,
            residual_stride, out_stride, next_stride, squares_stride, epsilon,
            K, GATED, HAS_NORM, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, PARTS, MOST_PARTS, LEAVES, NEXT_ADDS_ONE,
        )  # fmt: skip
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        SHARE: tl.constexpr = SIZE * (2 if GATED else 1) + BLOCK_M
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        column = SHARE - BLOCK_M + tl.arange(0, BLOCK_M)
        tile_index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        base = shares + tile_index.to(tl.int64) * (SPLIT_K * SHARE)
        mine = base + split * SHARE
        tl.store(mine + cell, sums)
        if GATED:
            tl.store(mine + SIZE + cell, other)
        if HAS_NORM:
            tl.store(mine + column, squares)
        tl.debug_barrier()  # the stores of all threads come before this program's arrival
        if tl.atomic_add(arrived + tile_index, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1:
            tl.store(arrived + tile_index, 0)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            other = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            squares = tl.zeros((BLOCK_M,), tl.float32)
            # Four at a time, so that their loads are under way together.
            for share in tl.range(0, SPLIT_K, loop_unroll_factor=4):
                sums += tl.load(base + share * SHARE + cell, cache_modifier=".cg")
                if GATED:
                    other += tl.load(base + share * SHARE + SIZE + cell, cache_modifier=".cg")
                if HAS_NORM:
                    squares += tl.load(base + share * SHARE + column, cache_modifier=".cg")
            load_and_finish(
                sums, other, squares, parts, bias, residual, out, next_gain, next_values, next_squares, n, m, rows, outputs,
                residual_stride, out_stride, next_stride, squares_stride, epsilon,
                K, GATED, HAS_NORM, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, PARTS, MOST_PARTS, LEAVES, NEXT_ADDS_ONE,
            )  # fmt: skip
