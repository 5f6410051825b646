"""Packed weights: made once, mapped ever after, and made again where they are broken."""

import os
from collections import namedtuple

import numpy as np
import pytest
import torch

from shoestring.errors import RequestError, ShoestringError
from shoestring.hub.cache import subfolder
from shoestring.quantization import WeightType, check_quantize, pack, packed_matrices, weight_type_for

native = pytest.importorskip("shoestring._native", reason="built without the native part")

SHAPES = {
    "embed_tokens.weight": (50, 64),
    "layers.0.mlp.up_proj.weight": (48, 64),
    "layers.0.mlp.odd.weight": (8, 40),
    "norm.weight": (64,),
}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def dequantized(matrix):
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    for row in range(matrix.rows):
        native.dequantize_row(
            int(matrix.type), matrix.rows, matrix.cols, matrix.data, row, out[row : row + 1]
        )
    return out


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_packed_once_and_mapped_after(weights, quantize):
    read = []

    def source(name):
        read.append(name)
        return weights[name]

    first = packed_matrices("key", SHAPES, source, quantize)
    assert sorted(read) == sorted(SHAPES)
    second = packed_matrices("key", SHAPES, source, quantize)
    assert len(read) == len(SHAPES)
    for name, weight in weights.items():
        assert bytes(first[name].data) == bytes(second[name].data)
        kind = weight_type_for(name, SHAPES[name], quantize)
        assert first[name].type == kind
        np.testing.assert_array_equal(dequantized(first[name]), dequantized(pack(weight, kind)))
        assert first[name].data.ctypes.data % 64 == 0 or first[name].rows == 1


def test_types_by_name_and_shape():
    assert weight_type_for("norm.weight", (64,), "int4") == WeightType.F32
    assert weight_type_for("layers.0.mlp.up_proj.weight", (48, 64), None) == WeightType.BF16_TILES
    assert weight_type_for("layers.0.mlp.up_proj.weight", (48, 64), "int4") == WeightType.INT4_TILES
    # The most sensitive ones stay wider; widths that are no whole blocks stay bfloat16.
    assert weight_type_for("lm_head.weight", (50, 64), "int4") == WeightType.INT8_TILES
    assert weight_type_for("embed_tokens.weight", (50, 64), "int4") == WeightType.INT8_TILES
    assert weight_type_for("layers.0.mlp.odd.weight", (8, 40), "int8") == WeightType.BF16_TILES


def test_error_of_each_type(weights):
    weight = weights["layers.0.mlp.up_proj.weight"]
    errors = {
        kind: np.abs(dequantized(pack(weight, kind)) - weight.numpy()).mean()
        for kind in (WeightType.BF16_TILES, WeightType.INT8_TILES, WeightType.INT4_TILES)
    }
    assert (
        0
        < errors[WeightType.BF16_TILES]
        < errors[WeightType.INT8_TILES]
        < errors[WeightType.INT4_TILES]
        < 0.08
    )


@pytest.mark.parametrize("damage", ["cut", "header", "manifest", "missing"])
def test_broken_folder_is_made_again(weights, damage):
    before = {name: bytes(m.data) for name, m in packed_matrices("key", SHAPES, weights.get, "int8").items()}
    (folder,) = subfolder("packed").iterdir()
    file, manifest = folder / "weights.safetensors", folder / "shoestring.json"
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 10)
    elif damage == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif damage == "manifest":
        manifest.write_text("[]")
    else:
        file.unlink()
    again = packed_matrices("key", SHAPES, weights.get, "int8")
    assert {name: bytes(m.data) for name, m in again.items()} == before


def test_interrupted_packing_leaves_nothing(weights):
    def source(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed_matrices("key", SHAPES, source, "int8")
    assert not list(subfolder("packed").iterdir())


def test_no_room(weights, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(100, 90, 10))
    with pytest.raises(ShoestringError, match=r"packing the weights needs \d+ bytes"):
        packed_matrices("key", SHAPES, weights.get, "int8")


def test_unknown_quantize():
    assert check_quantize(None) is None
    with pytest.raises(RequestError, match=r"unknown quantize 'int5' .*one of int8, int4"):
        check_quantize("int5")
