"""Weights for the GPU: the CPU's numbers, whoever packed them."""

import numpy as np
import pytest
import torch

from shoestring.engine.cuda.weights import join_weights, pack_weight, weight_of_tiles
from shoestring.errors import RequestError
from shoestring.quantization import WeightType, pack

TILES = {"int8": WeightType.INT8_TILES, "int4": WeightType.INT4_TILES}


def weights(outputs: int, inputs: int) -> torch.Tensor:
    """Rows of all sizes: ordinary ones, zeros, beyond float16's range, constant, so small that scales are subnormal."""
    torch.manual_seed(outputs)
    found = torch.randn(outputs, inputs) * torch.rand(outputs, 1)
    found[1], found[2], found[3], found[4] = 0, found[2] * 1e6, 0.25, found[4] * 1e-6
    return found


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(48, 64), (37, 96), (200, 576)])
def test_numbers_are_the_cpus(quantize, shape):
    native = pytest.importorskip("shoestring._native", reason="built without the native part")
    weight = weights(*shape)
    tiles = pack(weight, TILES[quantize])
    expected = np.empty(shape, np.float32)
    for row in range(shape[0]):
        native.dequantize_row(int(tiles.type), *shape, tiles.data, row, expected[row : row + 1])
    moved = weight_of_tiles(tiles, "cpu", torch.float32)
    packed = pack_weight(weight, quantize)
    assert torch.equal(moved.dense(), torch.from_numpy(expected))
    assert torch.equal(packed.values, moved.values)
    assert torch.equal(packed.scales, moved.scales)
    some = torch.tensor([5, 0, 36])
    assert torch.equal(packed.rows(some), torch.from_numpy(expected)[some])


def test_quantised_in_parts_is_quantised_at_once(monkeypatch):
    weight = weights(100, 96)
    whole = pack_weight(weight, "int4")
    monkeypatch.setattr("shoestring.engine.cuda.weights._CHUNK", 7 * 96)
    parts = pack_weight(weight, "int4")
    assert torch.equal(whole.values, parts.values)
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_joined_weights_are_those_of_the_joined_matrix(quantize):
    parts = [weights(rows, 96) for rows in (32, 16, 7)]
    joined = join_weights([pack_weight(part, quantize) for part in parts])
    whole = pack_weight(torch.cat(parts), quantize)
    assert (joined.kind, joined.outputs, joined.inputs, joined.dtype) == (
        "dense" if quantize is None else quantize,
        55,
        96,
        whole.dtype,
    )
    assert torch.equal(joined.values, whole.values)
    assert torch.equal(joined.dense(), whole.dense())
    with pytest.raises(RequestError, match="cannot be joined"):
        join_weights([pack_weight(parts[0], "int8"), pack_weight(parts[1], "int4")])


def test_bytes_of_a_pass():
    weight = weights(64, 256)
    assert pack_weight(weight.bfloat16()).nbytes == 64 * 256 * 2
    assert pack_weight(weight, "int8").nbytes == 64 * 8 * 34
    assert pack_weight(weight, "int4").nbytes == 64 * 8 * 20


def test_odd_widths_stay_dense():
    weight = weights(8, 40)
    packed = pack_weight(weight, "int8")
    assert packed.kind == "dense"
    assert torch.equal(packed.dense(), weight)


def test_other_types_are_refused():
    pytest.importorskip("shoestring._native", reason="built without the native part")
    with pytest.raises(RequestError, match="F32"):
        weight_of_tiles(pack(weights(16, 32), WeightType.F32), "cpu")
