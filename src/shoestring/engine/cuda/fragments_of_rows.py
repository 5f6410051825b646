"""What `fragments_kernel` multiplies with where there are several rows: each group's inputs of eight rows at a time.

A group's sums are scaled in float32, and the sums of the inputs, which the tensor cores make as well, take int4's minima
and what the integers were unpacked with.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from shoestring.engine.cuda.tile_loads import load, places, wrapped
from shoestring.engine.cuda.unpack_kernels import halves, ones_like, pairs, spread_nibbles

__all__ = ["begin_rows", "joined", "multiplied", "operands"]


@triton.jit
def begin_rows(x, first_m, rows, x_stride, CHUNKS: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a program's threads begin to read rows: words of two inputs."""
    warp, row, neighbour, word = places(4, WARPS)
    m = wrapped(first_m + (tl.arange(0, BLOCK_M // 8) * 8)[:, None, None] + row, rows)
    at = m * (x_stride // 2) + warp * (CHUNKS * 32) + 4 * neighbour + word
    return tl.max_contiguous(x.to(tl.pointer_type(tl.int32)) + at, [1, 1, 4])


@triton.jit
def _left(levels, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """Levels as `spread_nibbles` has them [TILES, 2, CHUNKS, WARPS, 8, 4, 2, 2, 2] as left operands [.., 16, 32]."""
    parts = tl.permute(levels, (0, 2, 3, 1, 4, 6, 5, 7, 8))
    return tl.reshape(parts, [TILES * CHUNKS * WARPS, 16, 32])


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
def operands(
    x, trip, words,
    K: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A trip's inputs, of even and of odd groups, and the sums of each group's. `words`: a matrix's, for their layout."""
    even = _right(x, trip, 0, K, EVEN, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE)
    odd = _right(x, trip, 1, K, EVEN, TILES, CHUNKS, WARPS, BLOCK_M, COMPUTE)
    words = tl.reshape(words, [TILES, 2, CHUNKS, WARPS, 8, 4, 2])
    ones = _left(ones_like(words, COMPUTE, PTX), TILES, CHUNKS, WARPS)
    return even, odd, tl.dot(ones, even), tl.dot(ones, odd)


@triton.jit
def multiplied(
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
def joined(sums, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """All shares' sums of a program's outputs [BLOCK_N, BLOCK_M]."""
    sums = tl.sum(tl.reshape(sums, [TILES, CHUNKS, WARPS, 16, BLOCK_M]), 1)
    return tl.reshape(tl.sum(sums, 1), [TILES * 16, BLOCK_M])
