"""The native few-row products with quantised weights, against the formats' definition in numpy and fp64."""

import ctypes
import mmap
import sys

import gguf
import numpy as np
import pytest

native = pytest.importorskip("shoestring._native", reason="built without the native part")

F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, INT8_TILES, INT4_TILES = (
    1, 2, 3, 6, 7, 8, 12, 13, 14, 1001, 1002,
)  # fmt: skip
NAMES = {
    F16: "f16", Q4_0: "q4_0", Q4_1: "q4_1", Q8_0: "q8_0", Q4_K: "q4_k", Q5_K: "q5_k", Q6_K: "q6_k",
    Q5_0: "q5_0", Q5_1: "q5_1", INT8_TILES: "int8_tiles", INT4_TILES: "int4_tiles",
}  # fmt: skip
GGUF = [F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K]
# Where a block's half-precision numbers lie.
HALVES = {
    Q4_0: [0],
    Q4_1: [0, 2],
    Q5_0: [0],
    Q5_1: [0, 2],
    Q8_0: [0],
    Q4_K: [0, 2],
    Q5_K: [0, 2],
    Q6_K: [208],
}
SETS = native.available_instruction_sets()
EPSILON = float(np.finfo(np.float32).eps)

every_type = pytest.mark.parametrize("kind", list(NAMES), ids=list(NAMES.values()))
every_set = pytest.mark.parametrize("isa", SETS)


def block_cols(kind):
    return 256 if kind in (Q4_K, Q5_K, Q6_K) else 1 if kind == F16 else 32


def random_weights(kind, rows, cols, rng, extreme=False):
    """Any bytes that a file of this type may hold: all integers, scales of both signs, zero or (extreme) of any size."""
    size = native.quantized_matrix_bytes(kind, rows, cols)
    if kind == F16:
        return rng.standard_normal((rows, cols)).astype(np.float16).view(np.uint8).ravel()
    if kind in (INT8_TILES, INT4_TILES):
        data = np.empty(size, np.uint8)
        native.quantized_pack(kind, rng.standard_normal((rows, cols), dtype=np.float32), data)
        return data
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)][1]
    blocks = rng.integers(0, 256, (size // block, block), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = rng.standard_normal(len(blocks)) * 0.02
        if extreme:
            scales *= 10.0 ** rng.uniform(-6, 5, len(blocks))
        scales[rng.random(len(blocks)) < 0.05] = 0
        scales = np.clip(scales, -60000, 60000).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks.ravel()


def dequantize(kind, data, rows, cols):
    out = np.empty((rows, cols), np.float32)
    native.quantized_dequantize(kind, data, rows, cols, out)
    return out


def prepare(kind, isa, x):
    out = np.zeros(native.quantized_prepared_bytes(kind, isa, x.shape[1]) * len(x), np.uint8)
    native.quantized_prepare(kind, isa, x, out)
    return out


def multiply(kind, isa, data, rows, x, spans=None):
    y = np.full((len(x), rows), np.nan, np.float32)
    prepared = prepare(kind, isa, x)
    for first, last in spans or [(0, rows)]:
        native.quantized_multiply(kind, isa, data, rows, x.shape[1], prepared, first, last, y)
    return y


def uses_int8(kind, isa, cols):
    return native.quantized_prepared_bytes(kind, isa, cols) != 4 * cols


def rounded_to_int8(x):
    """The int8 rounding of activations: a scale per 32, rounded in fp32 (a tie goes the same way), then exact."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.float32(127) / np.where(largest, largest, np.float32(1))
    return (np.rint(blocks * inverse).astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def per_block_largest(w):
    blocks = np.abs(w).reshape(len(w), -1, 32 if w.shape[1] % 32 == 0 else 1)
    return np.broadcast_to(blocks.max(-1, keepdims=True), blocks.shape).reshape(w.shape)


def assert_close(kind, isa, y, x, w):
    """The weights have no error at all, the activations only their rounding, the sums only that of fp32."""
    w, exact = w.astype(np.float64), x.astype(np.float64)
    used = rounded_to_int8(x) if uses_int8(kind, isa, x.shape[1]) else exact
    # A block is d * q + m: its parts may be as large as its largest weight, whatever the others.
    size = np.abs(used) @ (np.abs(w) + 2 * per_block_largest(w)).T
    error = np.abs(y - used @ w.T)
    assert np.isfinite(y).all()
    assert (error <= 16 * EPSILON * size + 1e-30).all()
    if used is not exact:
        largest = np.abs(exact).reshape(len(x), -1, 32).max(-1).repeat(32, axis=1)
        bound = (largest / 254 * 1.001) @ np.abs(w).T
        assert (np.abs(y - exact @ w.T) <= bound + 16 * EPSILON * size).all()


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("kind", GGUF, ids=[NAMES[kind] for kind in GGUF])
def test_dequantizes_as_gguf_does(kind, extreme):
    rng = np.random.default_rng(kind)
    rows, cols = 19, 3 * 256
    data = random_weights(kind, rows, cols, rng, extreme)
    theirs = gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType(kind))
    ours = dequantize(kind, data, rows, cols)
    np.testing.assert_array_equal(ours, theirs)


@every_set
@every_type
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
def test_products_of_odd_shapes(kind, isa, rows):
    rng = np.random.default_rng(rows)
    for blocks in (1, 3, 5, 37):
        cols = blocks * max(block_cols(kind), 32)
        data = random_weights(kind, rows, cols, rng)
        w = dequantize(kind, data, rows, cols)
        for steps in (1, 2, 3, 8, 9):
            x = rng.standard_normal((steps, cols), dtype=np.float32)
            assert_close(kind, isa, multiply(kind, isa, data, rows, x), x, w)


@every_set
@every_type
def test_products_of_every_number_of_rows(kind, isa):
    rng = np.random.default_rng(1)
    rows, cols = 21, 1280
    data = random_weights(kind, rows, cols, rng)
    w = dequantize(kind, data, rows, cols)
    x = rng.standard_normal((130, cols), dtype=np.float32)
    for steps in range(1, 131, 1 if isa != "portable" else 43):
        assert_close(kind, isa, multiply(kind, isa, data, rows, x[:steps]), x[:steps], w)


@every_set
@every_type
def test_a_row_does_not_depend_on_the_others(kind, isa):
    """What exact multi-token decoding rests on: T rows at once give, bit for bit, what each gives alone."""
    rng = np.random.default_rng(2)
    rows, cols = 40, 2304
    data = random_weights(kind, rows, cols, rng)
    x = rng.standard_normal((67, cols), dtype=np.float32)
    together = multiply(kind, isa, data, rows, x)
    for steps in (1, 2, 3, 5, 8, 9, 13, 16, 24, 33, 64):
        for first in (0, len(x) - steps):
            part = multiply(kind, isa, data, rows, x[first : first + steps])
            np.testing.assert_array_equal(together[first : first + steps], part)


@every_set
@every_type
def test_row_ranges_fill_their_part_only(kind, isa):
    rng = np.random.default_rng(3)
    rows, cols = 75, 512
    data = random_weights(kind, rows, cols, rng)
    x = rng.standard_normal((3, cols), dtype=np.float32)
    whole = multiply(kind, isa, data, rows, x)
    step = native.quantized_row_multiple(kind, isa)
    middle = 2 * step if step > 1 else 37
    parts = multiply(kind, isa, data, rows, x, [(0, middle), (middle, rows)])
    np.testing.assert_array_equal(parts, whole)
    part = multiply(kind, isa, data, rows, x, [(middle, middle + 5)])
    assert np.isfinite(part[:, middle : middle + 5]).all()
    assert np.isnan(part[:, :middle]).all()
    assert np.isnan(part[:, middle + 5 :]).all()


@every_set
@every_type
@pytest.mark.parametrize("offset", [1, 2, 31])
def test_unaligned_weights(kind, isa, offset):
    """A memory-mapped tensor begins anywhere; the bytes right after it are not ours either."""
    rng = np.random.default_rng(offset)
    rows, cols = 35, 768
    data = random_weights(kind, rows, cols, rng)
    moved = np.empty(len(data) + offset, np.uint8)[offset:]
    moved[:] = data
    x = rng.standard_normal((4, cols), dtype=np.float32)
    np.testing.assert_array_equal(multiply(kind, isa, moved, rows, x), multiply(kind, isa, data, rows, x))


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page of memory")
@every_set
@every_type
@pytest.mark.parametrize("rows", [1, 17])
def test_reads_nothing_beyond_the_weights(kind, isa, rows):
    """The page after the tensor may not exist: reading it would kill this process."""
    rng = np.random.default_rng(rows)
    data = random_weights(kind, rows, 1280, rng)
    usable = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    with mmap.mmap(-1, usable + mmap.PAGESIZE) as view:
        memory = np.frombuffer(view, np.uint8)
        protect, last = ctypes.CDLL(None, use_errno=True).mprotect, memory.ctypes.data + usable
        assert protect(ctypes.c_void_p(last), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        edge = memory[usable - len(data) : usable]
        edge[:] = data
        for steps in (1, 9):
            x = rng.standard_normal((steps, 1280), dtype=np.float32)
            np.testing.assert_array_equal(
                multiply(kind, isa, edge, rows, x), multiply(kind, isa, data, rows, x)
            )
        del memory, edge


@every_set
@pytest.mark.parametrize("kind", sorted(HALVES), ids=[NAMES[kind] for kind in sorted(HALVES)])
def test_extreme_scales(kind, isa):
    rng = np.random.default_rng(4)
    rows, cols = 33, 1024
    data = random_weights(kind, rows, cols, rng, extreme=True)
    w = dequantize(kind, data, rows, cols)
    x = (rng.standard_normal((5, cols)) * 10.0 ** rng.uniform(-3, 3, (5, cols))).astype(np.float32)
    assert_close(kind, isa, multiply(kind, isa, data, rows, x), x, w)


@every_set
def test_rounding_of_activations_is_the_same_everywhere(isa):
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((7, 32 * 9)) * 10.0 ** rng.integers(-40, 30, (7, 1))).astype(np.float32)
    x[1, :64] = 0
    x[2, 5] = np.inf
    x[3, 40] = np.nan
    if not uses_int8(Q8_0, isa, x.shape[1]):
        pytest.skip("takes f32 activations")
    blocks = prepare(Q8_0, isa, x).reshape(7, 9, 48)
    reference = prepare(Q8_0, "avx2" if "avx2" in SETS else isa, x).reshape(7, 9, 48)
    np.testing.assert_array_equal(blocks, reference)
    values = blocks[..., :32].view(np.int8).astype(np.int32)
    scale, total = (blocks[..., at : at + 4].copy().view(np.float32)[..., 0] for at in (32, 36))
    bias, high = (blocks[..., at : at + 4].copy().view(np.int32)[..., 0] for at in (40, 44))
    np.testing.assert_array_equal(bias, -128 * values.sum(-1))
    np.testing.assert_array_equal(high, -128 * values[..., 16:].sum(-1))
    np.testing.assert_array_equal(total, scale * values.sum(-1).astype(np.float32))
    assert np.isnan(scale[2, 0])
    assert np.isnan(scale[3, 1])
    assert np.isfinite(np.delete(scale.ravel(), [2 * 9, 3 * 9 + 1])).all()
    assert np.abs(values).max() == 127


@every_set
def test_activations_that_are_not_finite_stay_visible(isa):
    rng = np.random.default_rng(6)
    data = random_weights(Q8_0, 20, 64, rng)
    x = rng.standard_normal((2, 64), dtype=np.float32)
    x[1, 3] = np.nan
    y = multiply(Q8_0, isa, data, 20, x)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_int8_packing_rounds_to_nearest(rows):
    rng = np.random.default_rng(rows)
    w = (rng.standard_normal((rows, 96)) * 10.0 ** rng.uniform(-5, 2, (rows, 1))).astype(np.float32)
    w[0, 32:64] = 0
    data = np.empty(native.quantized_matrix_bytes(INT8_TILES, rows, 96), np.uint8)
    native.quantized_pack(INT8_TILES, w, data)
    error = np.abs(dequantize(INT8_TILES, data, rows, 96) - w)
    # Half a step, and at the ends half of the scale's own rounding more (a half has no steps below 2^-24).
    assert (
        error <= 0.502 * per_block_largest(w) / 127 + 127 * (per_block_largest(w) / 127 * 2**-11 + 2**-25)
    ).all()


def test_int4_packing_beats_plain_rounding():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((48, 512)).astype(np.float32)
    plain = gguf.quants.dequantize(
        gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q4_1), gguf.GGMLQuantizationType.Q4_1
    )
    data = np.empty(native.quantized_matrix_bytes(INT4_TILES, *w.shape), np.uint8)
    native.quantized_pack(INT4_TILES, w, data)
    ours = dequantize(INT4_TILES, data, *w.shape)
    assert np.square(ours - w).sum() < 0.92 * np.square(plain - w).sum()


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-3])
def test_int4_packing_of_constant_blocks(value):
    w = np.full((3, 64), value, np.float32)
    data = np.empty(native.quantized_matrix_bytes(INT4_TILES, 3, 64), np.uint8)
    native.quantized_pack(INT4_TILES, w, data)
    np.testing.assert_allclose(dequantize(INT4_TILES, data, 3, 64), w, rtol=1e-3)


def test_shapes_that_do_not_fit_are_refused():
    assert native.quantized_matrix_bytes(Q8_0, 4, 33) == -1
    assert native.quantized_matrix_bytes(Q4_K, 4, 128) == -1
    assert native.quantized_matrix_bytes(9, 4, 32) == -1
    assert native.quantized_matrix_bytes(INT8_TILES, 17, 64) == 2 * 2 * 544
    with pytest.raises(ValueError, match="needs 136 bytes, got 135"):
        native.quantized_dequantize(Q8_0, np.zeros(135, np.uint8), 4, 32, np.empty((4, 32), np.float32))
