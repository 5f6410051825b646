"""Triton kernel of the products of many rows with a wide dense matrix, brought by Hopper's copy engine.

What limits them is not memory but what the L2 cache gives out: each program reads all rows beside its own weights. So tiles
are as wide as one wave of programs allows. A tile is a power of two wide and a wave's share is not, so that a tail follows:
96 outputs are 64 and 32. The rows are the left operand of the tensor cores, whose tiles may then be narrow.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoestring.engine.cuda.linear_kernels import load_and_finish
from shoestring.engine.cuda.tile_loads import prefetch

__all__ = ["wide_tiles_kernel"]


@triton.jit
def _multiplied(tile, weights, n, column, sums):
    """Sums with a tile of rows by a tile of weights, which begins at output n."""
    return tl.dot(tile, tl.trans(weights.load([n, column])), sums, input_precision="ieee")


@triton.jit
def _leave(at, sums, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    cell = tl.arange(0, BLOCK_M)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(at + cell, sums)


@triton.jit
def _gathered(base, SHARE: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """All shares of sums, added in their order."""
    cell = tl.arange(0, BLOCK_M)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for share in tl.range(0, SPLIT_K, loop_unroll_factor=4):
        sums += tl.load(base + share * SHARE + cell, cache_modifier=".cg")
    return sums


@triton.jit
def _finish(
    sums, other, parts, bias, residual, out, n, m, rows, outputs, residual_stride, out_stride, squares_stride, epsilon,
    K: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr, MOST_PARTS: tl.constexpr,
):  # fmt: skip
    squares = tl.zeros((m.shape[0],), tl.float32)
    load_and_finish(
        tl.trans(sums), tl.trans(other), squares, parts, bias, residual, out, out, out, out, n, m, rows, outputs,
        residual_stride, out_stride, 0, squares_stride, epsilon,
        K, GATED, False, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, PARTS, MOST_PARTS, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "outputs"])
def wide_tiles_kernel(
    x_tiles, first, second, first_tiles, first_tails, second_tiles, second_tails, parts, bias, residual, out, shares,
    arrived, rows, outputs, values_stride, residual_stride, out_stride, squares_stride, epsilon,
    K: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr, MOST_PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, tiles of BLOCK_N + TAIL outputs, SPLIT_K).

    Args:
        x_tiles, first_tiles, second_tiles: descriptors of tiles [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K].
        first_tails, second_tails: those of the tails' [TAIL, BLOCK_K], or None.
        shares: float32, for each tile and share BLOCK_M * (BLOCK_N + TAIL) sums (twice where GATED).

    The rest is `few_rows_kernel`'s.
    """
    TRIPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EACH: tl.constexpr = (TRIPS + SPLIT_K - 1) // SPLIT_K
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M
    start = tl.program_id(1) * (BLOCK_N + TAIL)
    tail = start + BLOCK_N
    first_trip = split * EACH
    last_trip = tl.minimum(first_trip + EACH, TRIPS)
    if PDL:
        if not LATE:
            gdc_launch_dependents()
        if LINES > 0:
            WIDTH: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
            own = tl.minimum(start + tl.arange(0, BLOCK_N), outputs - 1)
            prefetch(first, values_stride * WIDTH, first_trip * BLOCK_K * WIDTH, own, K * WIDTH, LINES)
            if GATED:
                prefetch(second, values_stride * WIDTH, first_trip * BLOCK_K * WIDTH, own, K * WIDTH, LINES)
        gdc_wait()
        if LATE:
            gdc_launch_dependents()

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    other = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TAIL:
        tail_sums = tl.zeros((BLOCK_M, TAIL), tl.float32)
        tail_other = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for trip in tl.range(first_trip, last_trip, num_stages=STAGES):
        column = trip * BLOCK_K
        tile = x_tiles.load([row, column])
        sums = _multiplied(tile, first_tiles, start, column, sums)
        if TAIL:
            tail_sums = _multiplied(tile, first_tails, tail, column, tail_sums)
        if GATED:
            other = _multiplied(tile, second_tiles, start, column, other)
            if TAIL:
                tail_other = _multiplied(tile, second_tails, tail, column, tail_other)

    m = row + tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, BLOCK_N)
    if SPLIT_K == 1:
        _finish(
            sums, other, parts, bias, residual, out, n, m, rows, outputs, residual_stride, out_stride, squares_stride,
            epsilon, K, GATED, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, PARTS, MOST_PARTS,
        )  # fmt: skip
        if TAIL:
            _finish(
                tail_sums, tail_other, parts, bias, residual, out, tail + tl.arange(0, TAIL), m, rows, outputs,
                residual_stride, out_stride, squares_stride, epsilon,
                K, GATED, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, PARTS, MOST_PARTS,
            )  # fmt: skip
    else:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        BOTH: tl.constexpr = BLOCK_M * (BLOCK_N + TAIL)
        SHARE: tl.constexpr = BOTH * (2 if GATED else 1)
        tile_index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        base = shares + tile_index.to(tl.int64) * (SPLIT_K * SHARE)
        mine = base + split * SHARE
        _leave(mine, sums, BLOCK_M, BLOCK_N)
        if TAIL:
            _leave(mine + SIZE, tail_sums, BLOCK_M, TAIL)
        if GATED:
            _leave(mine + BOTH, other, BLOCK_M, BLOCK_N)
            if TAIL:
                _leave(mine + BOTH + SIZE, tail_other, BLOCK_M, TAIL)
        tl.debug_barrier()  # the stores of all threads come before this program's arrival
        if tl.atomic_add(arrived + tile_index, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1:
            tl.store(arrived + tile_index, 0)
            sums = _gathered(base, SHARE, SPLIT_K, BLOCK_M, BLOCK_N)
            if GATED:
                other = _gathered(base + BOTH, SHARE, SPLIT_K, BLOCK_M, BLOCK_N)
            _finish(
                sums, other, parts, bias, residual, out, n, m, rows, outputs, residual_stride, out_stride,
                squares_stride, epsilon, K, GATED, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, PARTS, MOST_PARTS,
            )  # fmt: skip
            if TAIL:
                tail_sums = _gathered(base + SIZE, SHARE, SPLIT_K, BLOCK_M, TAIL)
                if GATED:
                    tail_other = _gathered(base + BOTH + SIZE, SHARE, SPLIT_K, BLOCK_M, TAIL)
                _finish(
                    tail_sums, tail_other, parts, bias, residual, out, tail + tl.arange(0, TAIL), m, rows, outputs,
                    residual_stride, out_stride, squares_stride, epsilon,
                    K, GATED, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, PARTS, MOST_PARTS,
                )  # fmt: skip
