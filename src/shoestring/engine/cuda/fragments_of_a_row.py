"""What `fragments_kernel` multiplies with where there is one row.

The tensor cores take eight rows at a time; one row's inputs are eight rows instead: of 256 inputs row j has the j-th group
of 32 and is zero elsewhere. So the sums come out by group, and a thread scales those of two groups only, for all 256 inputs
at once.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from shoestring.engine.cuda.tile_loads import load, places
from shoestring.engine.cuda.unpack_kernels import halves, ones_like, pairs, spread_nibbles

__all__ = ["joined_row", "multiplied_row", "operands_of_row"]


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
def operands_of_row(
    x, trip, words,
    K: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    COMPUTE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A trip's inputs, of even and of odd groups, and the sums of each group's. `words`: a matrix's, for their layout."""
    BLOCKS: tl.constexpr = CHUNKS // 4
    inputs = _inputs(x, trip, K, EVEN, BLOCKS, WARPS)
    even = _right(inputs, 0, TILES, BLOCKS, WARPS, COMPUTE)
    odd = _right(inputs, 1, TILES, BLOCKS, WARPS, COMPUTE)
    words = tl.reshape(words, [TILES, 2, BLOCKS, 4, WARPS, 8, 4, 2])
    ones = _left(ones_like(words, COMPUTE, PTX), TILES, BLOCKS, WARPS)
    return even, odd, tl.dot(ones, odd, tl.dot(ones, even))


@triton.jit
def multiplied_row(
    sums, even_words, odd_words, scales, even, odd, inputs_sum,
    KIND: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, COMPUTE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The sums and a trip's products."""
    BLOCKS: tl.constexpr = CHUNKS // 4
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
def joined_row(sums, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """All shares' sums of a program's outputs [BLOCK_N, 1]."""
    BLOCKS: tl.constexpr = CHUNKS // 4
    sums = tl.permute(tl.reshape(sums, [TILES, BLOCKS * WARPS, 16, 8]), (0, 2, 1, 3))
    return tl.sum(tl.reshape(sums, [TILES * 16, BLOCKS * WARPS * 8]), 1)[:, None]
