"""What 64 inputs of quantised weights add to a tile's sums, on the tensor cores.

`add_int8` and `add_int4` multiply the integers that the weights are, exact in bfloat16, and scale each group's sum in
float32: a product and a sum of the tile's size for each group, which is little for few rows. `add_written` rounds the
weights to COMPUTE, as a dense matrix would have them, so that all products run into one sum, which pays with many rows.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from shoestring.engine.cuda.tile_loads import load
from shoestring.engine.cuda.unpack_kernels import halves, nibbles, wide_bytes, wide_nibbles

__all__ = ["add_int4", "add_int8", "add_written"]


@triton.jit
def add_int8(
    sums, values, scales, n, chunk, scales_stride, even, odd, K: tl.constexpr, EVEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add two groups' products: 64 inputs."""
    byte = chunk * 64 + tl.arange(0, 32)
    words = load(scales + chunk * scales_stride + n, chunk * 64 < K, EVEN, "evict_first")
    even_scale, odd_scale = halves(words)
    levels = load(values + byte[None, :], (byte < K)[None, :], EVEN, "evict_first")
    sums += even_scale[:, None] * tl.dot(levels.to(COMPUTE), even, input_precision="ieee")
    levels = load(values + byte[None, :] + 32, (byte + 32 < K)[None, :], EVEN, "evict_first")
    return sums + odd_scale[:, None] * tl.dot(levels.to(COMPUTE), odd, input_precision="ieee")


@triton.jit
def add_int4(
    sums, values, scales, n, chunk, scales_stride, even, odd, even_sum, odd_sum,
    K: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add two groups' products: 64 inputs."""
    inside = chunk * 64 < K
    pairs = load(values + chunk * 32 + tl.arange(0, 32)[None, :], inside, EVEN, "evict_first")
    low, high, offset = nibbles(pairs, COMPUTE, PTX)
    words = load(scales + chunk * scales_stride + n, inside, EVEN, "evict_first")
    scale, minimum = halves(words)
    part = tl.dot(low, even, input_precision="ieee")
    sums += scale[:, None] * part
    sums += (minimum - offset * scale)[:, None] * even_sum
    scale, minimum = halves(words >> 32)
    part = tl.dot(high, odd, input_precision="ieee")
    sums += scale[:, None] * part
    return sums + (minimum - offset * scale)[:, None] * odd_sum


@triton.jit
def add_written(
    sums, values, scales, n, chunk, scales_stride, right,
    K: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add the products of 64 inputs, with weights rounded to COMPUTE. A thread has two bytes side by side."""
    BLOCK_N: tl.constexpr = sums.shape[0]
    inside = chunk * 64 < K
    if KIND == 8:
        byte = chunk * 64 + tl.arange(0, 64)[None, :]
        scale, other = halves(load(scales + chunk * scales_stride + n, inside, EVEN, "evict_first"))
        levels, offset = wide_bytes(load(values + byte, byte < K, EVEN, "evict_first"), PTX, 2)
        both = tl.join(scale, other)[:, :, None]
        weights = (tl.reshape(levels, [BLOCK_N, 2, 32]) * both - offset * both).to(COMPUTE)
    else:
        words = load(scales + chunk * scales_stride + n, inside, EVEN, "evict_first")
        pairs = load(values + chunk * 32 + tl.arange(0, 32)[None, :], inside, EVEN, "evict_first")
        low, high, offset = wide_nibbles(pairs, PTX, 2)
        scale, minimum = halves(words)
        low = low * scale[:, None] + (minimum - offset * scale)[:, None]
        scale, minimum = halves(words >> 32)
        high = high * scale[:, None] + (minimum - offset * scale)[:, None]
        weights = tl.permute(tl.join(low.to(COMPUTE), high.to(COMPUTE)), (0, 2, 1))
    return tl.dot(tl.reshape(weights, [BLOCK_N, 64]), right, sums, input_precision="ieee")
