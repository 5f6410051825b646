"""The dense kernels one by one against numpy in float64, on every instruction set that this machine has."""

import numpy as np
import pytest
import torch

from shoestring.quantization import WeightType

native = pytest.importorskip("shoestring._native", reason="built without the native part")

SETS = native.instruction_sets()
SHAPES = [(16, 32), (48, 96), (37, 160), (200, 576), (1, 32), (131, 64), (65, 1536), (18, 50), (33, 7)]
ROWS = [1, 2, 3, 5, 8, 12, 13, 16, 20, 21, 33, 64, 130]


def unaligned(array):
    """The same bytes at an odd address."""
    data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    memory = np.zeros(data.size + 64, np.uint8)
    start = (-memory.ctypes.data) % 64 + 3
    memory[start : start + data.size] = data
    return memory[start : start + data.size]


def product(kind, weights, x, isa, dots=False):
    rows, cols = weights.shape
    if kind == WeightType.F32:
        data = unaligned(weights.numpy())
    else:
        halves = weights.to(torch.bfloat16).view(torch.int16).numpy()
        data = unaligned(halves) if kind == WeightType.BF16 else native.pack_bf16_tiles(halves, rows, cols)
    y = np.full((len(x), rows), np.nan, np.float32)
    native.multiply(int(kind), rows, cols, data, x.numpy(), y, isa, dots)
    return y


def operands(rows, cols, count):
    generator = torch.Generator().manual_seed(rows * 1000 + cols + count)
    weights = torch.randn(rows, cols, generator=generator)
    return weights.bfloat16().float(), torch.randn(count, cols, generator=generator)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    "kind", [WeightType.F32, WeightType.BF16, WeightType.BF16_TILES], ids=lambda kind: kind.name
)
def test_error_is_at_most_twice_that_of_torch(kind, isa):
    dtype = torch.float32 if kind == WeightType.F32 else torch.bfloat16
    for rows, cols in SHAPES:
        for count in ROWS:
            weights, x = operands(rows, cols, count)
            exact = x.double().numpy() @ weights.double().numpy().T
            theirs = torch.nn.functional.linear(x.to(dtype), weights.to(dtype)).double().numpy()
            error = np.abs(product(kind, weights, x, isa) - exact).max()
            assert error <= 2 * np.abs(theirs - exact).max() + 1e-5, (rows, cols, count)
            # A sum in float32 over the inputs (the portable twin rounds products too).
            terms = float((x.abs() @ weights.abs().T).max())
            assert error <= 2**-23 * cols**0.5 * terms, (rows, cols, count)


@pytest.mark.skipif("avx512_bf16_vnni" not in SETS, reason="needs AVX-512 BF16")
def test_pair_dot_products_round_the_activations_only():
    for rows, cols in SHAPES:
        for count in (1, 4, 13, 40):
            weights, x = operands(rows, cols, count)
            exact = x.bfloat16().double().numpy() @ weights.double().numpy().T
            ours = product(WeightType.BF16_TILES, weights, x, "avx512_bf16_vnni", dots=True)
            theirs = torch.nn.functional.linear(x.bfloat16(), weights.bfloat16()).float().numpy()
            assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max() + 1e-5


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    "kind", [WeightType.F32, WeightType.BF16, WeightType.BF16_TILES], ids=lambda kind: kind.name
)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind, isa):
    weights, x = operands(83, 160, 130)
    whole = product(kind, weights, x, isa)
    for begin, end in ((0, 1), (1, 3), (3, 10), (10, 22), (22, 42), (42, 130)):
        np.testing.assert_array_equal(product(kind, weights, x[begin:end], isa), whole[begin:end])


@pytest.mark.parametrize(
    "kind", [WeightType.F32, WeightType.BF16, WeightType.BF16_TILES], ids=lambda kind: kind.name
)
def test_rows_are_read_back(kind):
    weights, _ = operands(37, 51, 1)
    halves = weights.bfloat16().view(torch.int16).numpy()
    data = {
        WeightType.F32: weights.numpy(),
        WeightType.BF16: halves,
        WeightType.BF16_TILES: native.pack_bf16_tiles(halves, 37, 51),
    }[kind]
    out = np.zeros((1, 51), np.float32)
    for row in (0, 15, 16, 36):
        native.dequantize_row(int(kind), 37, 51, data, row, out)
        np.testing.assert_array_equal(out[0], weights[row].numpy())


def test_a_buffer_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="needs 4096 bytes, and has 4000"):
        native.multiply(0, 32, 32, bytes(4000), np.zeros((1, 32), np.float32), np.zeros((1, 32), np.float32))
