"""Triton kernels of the products with one row, of norms for many rows, and of quantised matrices unpacked for prefill.

`one_row_kernel` works on the ordinary cores, in float32 from the loads on: a program takes BLOCK_N outputs, its threads
keep sums of their own inputs to the end and join them once. UNROLL 0: all loads are laid out at once, the first before the
kernel in front has ended (PDL); else so many trips of the loop are, or STAGES of them go through shared memory.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.linear_kernels import activated
from shoestring.engine.cuda.tile_loads import gained, load, prefetch
from shoestring.engine.cuda.unpack_kernels import halves, signed, small, wide_bytes, wide_nibbles

__all__ = ["dequantize_kernel", "norm_kernel", "one_row_kernel"]


@triton.jit
def _add_int8(
    sums, first, second, scales, chunk, own, scales_stride, even, odd, K: tl.constexpr, EVEN: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    inside = (chunk * 64 < K)[None, :]
    at = scales + chunk[None, :] * scales_stride + own[:, None]
    even_scale, odd_scale = halves(load(at, inside, EVEN, "evict_first"))
    levels, offset = wide_bytes(first, PTX, 4)
    sums += even_scale * (tl.sum(levels * even[None, :, :], 2) - offset * tl.sum(even, 1)[None, :])
    levels, offset = wide_bytes(second, PTX, 4)
    return sums + odd_scale * (tl.sum(levels * odd[None, :, :], 2) - offset * tl.sum(odd, 1)[None, :])


@triton.jit
def _add_int4(
    sums, pairs, scales, chunk, own, scales_stride, even, odd, K: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    inside = (chunk * 64 < K)[None, :]
    at = scales + chunk[None, :] * scales_stride + own[:, None]
    low, high, offset = wide_nibbles(pairs, PTX, 4)
    words = load(at, inside, EVEN, "evict_first")
    scale, minimum = halves(words)
    minimum -= offset * scale
    sums += scale * tl.sum(low * even[None, :, :], 2) + minimum * tl.sum(even, 1)[None, :]
    scale, minimum = halves(words >> 32)
    minimum -= offset * scale
    return sums + scale * tl.sum(high * odd[None, :, :], 2) + minimum * tl.sum(odd, 1)[None, :]


@triton.jit
def _inputs(
    x, gain, squares, k, K: tl.constexpr, EVEN: tl.constexpr, HAS_NORM: tl.constexpr, ADDS_ONE: tl.constexpr
):
    """Inputs to multiply with, and the squares so far."""
    values = load(x + k, k < K, EVEN, "evict_last").to(tl.float32)
    if HAS_NORM:
        squares += values * values
        values = gained(values, gain, k, K, EVEN, ADDS_ONE)
    return values, squares


@triton.jit
def _trip(
    trip, sums, other, squares, added, x, first, first_scales, second, second_scales, gain, residual, n, own, outputs,
    values_stride, scales_stride, K: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr,
    ADDS_ONE: tl.constexpr, BLOCK_K: tl.constexpr, PTX: tl.constexpr, WAIT: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """BLOCK_K more inputs; WAIT: between the loads of the weights and all others. ADDS: also load what is added."""
    EVEN: tl.constexpr = K % BLOCK_K == 0
    if KIND == 0:
        k = trip * BLOCK_K + tl.arange(0, BLOCK_K)
        at = own.to(tl.int64)[:, None] * values_stride + k[None, :]
        inside = (k < K)[None, :]
        weights = load(first + at, inside, EVEN, "evict_first")
        if GATED:
            more = load(second + at, inside, EVEN, "evict_first")
        if WAIT:
            gdc_wait()
        if ADDS:
            added = tl.load(residual + n, mask=n < outputs, other=0.0).to(tl.float32)
        # Several trips: each thread reads the inputs of its own weights, since an exchange would need barriers.
        own_k = k[None, :] if K <= BLOCK_K else tl.broadcast_to(k[None, :], at.shape)
        values, squares = _inputs(x, gain, squares, own_k, K, EVEN, HAS_NORM, ADDS_ONE)
        sums += weights.to(tl.float32) * values
        if GATED:
            other += more.to(tl.float32) * values
    else:
        byte = tl.arange(0, 32)
        chunk = trip * (BLOCK_K // 64) + tl.arange(0, BLOCK_K // 64)
        k = chunk[:, None] * 64 + byte[None, :]
        own_row = own.to(tl.int64)[:, None, None] * values_stride
        if KIND == 8:
            at = own_row + k[None, :, :]
            inside = (k < K)[None, :, :]
            odd_inside = (k + 32 < K)[None, :, :]
            levels = load(first + at, inside, EVEN, "evict_first")
            odd_levels = load(first + at + 32, odd_inside, EVEN, "evict_first")
            if GATED:
                more = load(second + at, inside, EVEN, "evict_first")
                odd_more = load(second + at + 32, odd_inside, EVEN, "evict_first")
        else:
            at = own_row + (chunk[:, None] * 32 + byte[None, :])[None, :, :]
            inside = (chunk * 64 < K)[None, :, None]
            levels = load(first + at, inside, EVEN, "evict_first")
            if GATED:
                more = load(second + at, inside, EVEN, "evict_first")
        if WAIT:
            gdc_wait()
        if ADDS:
            added = tl.load(residual + n, mask=n < outputs, other=0.0).to(tl.float32)
        even, squares = _inputs(x, gain, squares, k, K, EVEN, HAS_NORM, ADDS_ONE)
        odd, squares = _inputs(x, gain, squares, k + 32, K, EVEN, HAS_NORM, ADDS_ONE)
        if KIND == 8:
            sums = _add_int8(
                sums, levels, odd_levels, first_scales, chunk, own, scales_stride, even, odd, K, EVEN, PTX
            )
            if GATED:
                other = _add_int8(
                    other, more, odd_more, second_scales, chunk, own, scales_stride, even, odd, K, EVEN, PTX
                )
        else:
            sums = _add_int4(sums, levels, first_scales, chunk, own, scales_stride, even, odd, K, EVEN, PTX)
            if GATED:
                other = _add_int4(
                    other, more, second_scales, chunk, own, scales_stride, even, odd, K, EVEN, PTX
                )
    return sums, other, squares, added


@triton.jit(do_not_specialize=["outputs"])
def one_row_kernel(
    x, first, first_scales, second, second_scales, gain, bias, residual, out, outputs, values_stride,
    scales_stride, epsilon,
    K: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr, ADDS_ONE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of outputs,)."""
    CELLS: tl.constexpr = BLOCK_K if KIND == 0 else BLOCK_K // 64
    TRIPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(n, outputs - 1)
    sums = tl.zeros((BLOCK_N, CELLS), tl.float32)
    other = tl.zeros((BLOCK_N, CELLS), tl.float32)
    added = tl.zeros((BLOCK_N,), tl.float32)
    if KIND != 0:
        squares = tl.zeros((CELLS, 32), tl.float32)
    elif K <= BLOCK_K:
        squares = tl.zeros((1, BLOCK_K), tl.float32)
    else:
        squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if PDL:
        gdc_launch_dependents()
    if UNROLL == 0:
        for trip in tl.static_range(TRIPS):
            sums, other, squares, added = _trip(
                trip, sums, other, squares, added, x, first, first_scales, second, second_scales, gain, residual, n, own,
                outputs, values_stride, scales_stride, K, KIND, GATED, HAS_NORM, ADDS_ONE, BLOCK_K, PTX,
                PDL and trip == 0, HAS_RESIDUAL and trip == 0,
            )  # fmt: skip
    else:
        if PDL:
            if LINES > 0:
                WIDTH: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
                ROW: tl.constexpr = (K + 63) // 64 * 32 if KIND == 4 else K * WIDTH
                prefetch(first, values_stride * WIDTH, 0, own, ROW, LINES)
                if GATED:
                    prefetch(second, values_stride * WIDTH, 0, own, ROW, LINES)
            gdc_wait()
        if HAS_RESIDUAL:
            added = tl.load(residual + n, mask=n < outputs, other=0.0).to(tl.float32)
        for trip in tl.range(0, TRIPS, num_stages=STAGES, loop_unroll_factor=UNROLL):
            sums, other, squares, _ = _trip(
                trip, sums, other, squares, added, x, first, first_scales, second, second_scales, gain, residual, n, own,
                outputs, values_stride, scales_stride, K, KIND, GATED, HAS_NORM, ADDS_ONE, BLOCK_K, PTX, False, False,
            )  # fmt: skip
    result = tl.sum(sums, 1)
    if HAS_NORM:
        if KIND == 0 and K > BLOCK_K:
            factor = tl.rsqrt(tl.sum(squares, 1) / K + epsilon)
        else:
            factor = tl.rsqrt(tl.sum(squares) / K + epsilon)
        result *= factor
    inside = n < outputs
    if HAS_BIAS:
        result += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    result = activated(result, ACTIVATION)
    if GATED:
        up = tl.sum(other, 1)
        if HAS_NORM:
            up *= factor
        result *= up
    if HAS_RESIDUAL:
        result += added
    tl.store(out + n, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_kernel(
    x, gain, out, x_stride, out_stride, epsilon,
    K: tl.constexpr, ADDS_ONE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm of a row. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values) / K + epsilon)
    result = gained(values, gain, k, K, K == BLOCK, ADDS_ONE) * factor
    tl.store(out + row * out_stride + k, result.to(out.dtype.element_ty), mask=k < K)


@triton.jit(do_not_specialize=["outputs"])
def dequantize_kernel(
    values, scales, out, outputs, values_stride, scales_stride, out_stride,
    K: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write a quantised matrix as numbers. Grid (tiles of outputs, tiles of inputs)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1) * (BLOCK_K // 64) + tl.arange(0, BLOCK_K // 64)
    k = chunk[:, None] * 64 + tl.arange(0, 32)[None, :]
    own = n.to(tl.int64)[:, None, None]
    within = (n < outputs)[:, None, None]
    even_inside, odd_inside = within & (k < K)[None, :, :], within & (k + 32 < K)[None, :, :]
    at = scales + chunk[None, :] * scales_stride + n[:, None]
    inside = (n < outputs)[:, None] & (chunk * 64 < K)[None, :]
    to = out + own * out_stride + k[None, :, :]
    kind = out.dtype.element_ty
    words = tl.load(at, mask=inside, other=0)
    lower, upper = halves(words)
    if KIND == 8:
        rows = values + own * values_stride + k[None, :, :]
        levels = signed(tl.load(rows, mask=even_inside, other=0))
        tl.store(to, (levels * lower[:, :, None]).to(kind), mask=even_inside)
        levels = signed(tl.load(rows + 32, mask=odd_inside, other=0))
        tl.store(to + 32, (levels * upper[:, :, None]).to(kind), mask=odd_inside)
    else:
        rows = values + own * values_stride + (chunk[:, None] * 32 + tl.arange(0, 32)[None, :])[None, :, :]
        pairs = tl.load(rows, mask=inside[:, :, None], other=0)
        low = small(pairs & 15) * lower[:, :, None] + upper[:, :, None]
        tl.store(to, low.to(kind), mask=even_inside)
        lower, upper = halves(words >> 32)
        high = small(pairs >> 4) * lower[:, :, None] + upper[:, :, None]
        tl.store(to + 32, high.to(kind), mask=odd_inside)
