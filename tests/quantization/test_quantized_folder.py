"""Quantised folders: what was rounded is what runs, on every body; broken or misused ones are refused in a line."""

import json

import numpy as np
import pytest
import torch
from folders import write_gguf, write_llama

import shoestring
from shoestring import hub
from shoestring.decoding.look_ahead import Base
from shoestring.engine import native_runner
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.native_loading import weight_shapes
from shoestring.engine.native_runner import NativeRunner
from shoestring.errors import ModelFileError, RequestError, UnsupportedModelError
from shoestring.model import quantize_model
from shoestring.quantization import (
    WeightType,
    calibrated,
    describe_quantized,
    pack,
    quantized_matrices,
    quantized_rows,
    unpack,
)
from shoestring.quantization.calibration import calibration_windows, read_calibration_text
from shoestring.quantization.formats import packed_bytes

native = pytest.importorskip("shoestring._native", reason="built without the native part")

TOKENS = [(7 * i + 3) % 250 for i in range(40)]
TEXT = "A dog runs through the snow. The cat sleeps by the stove, and it rains. " * 60


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def plain(tmp_path):
    return write_llama(tmp_path / "tiny")


def scores(model):
    return np.array(model.score(TOKENS).logprobs)


@pytest.mark.parametrize("kind", [WeightType.BF16_TILES, WeightType.INT8_TILES, WeightType.INT4_TILES])
@pytest.mark.parametrize("rows", [48, 37])
def test_unpacked_numbers_are_those_that_the_kernels_read(kind, rows):
    cols = 33 if kind == WeightType.BF16_TILES else 96
    matrix = pack(torch.randn(rows, cols), kind)
    assert len(matrix.data) == packed_bytes(kind, rows, cols) == native.matrix_bytes(int(kind), rows, cols)
    expected = np.empty((rows, cols), np.float32)
    for row in range(rows):
        native.dequantize_row(int(kind), rows, cols, matrix.data, row, expected[row : row + 1])
    np.testing.assert_array_equal(unpack(matrix).numpy(), expected)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("source", ["folder", "shards", "gguf"])
def test_to_the_nearest_is_what_load_rounds_to(tmp_path, source, quantize):
    if source == "gguf":
        name = str(write_gguf(tmp_path / "tiny.gguf"))
    else:
        name = str(write_llama(tmp_path / "tiny", shard_size="100KB" if source == "shards" else "5GB"))
    seen = []
    done = quantize_model(name, tmp_path / "small", quantize, progress=lambda *step: seen.append(step))
    assert (done.folder, done.quantize, done.method) == (tmp_path / "small", quantize, "nearest")
    assert done.nbytes == hub.folder_bytes(done.folder) > 0
    assert any(stage == "pack" for stage, *_ in seen)
    model, expected = (
        shoestring.load(str(done.folder), device="cpu"),
        shoestring.load(name, device="cpu", quantize=quantize),
    )
    assert isinstance(model.runner, NativeRunner)
    assert model.runner.weights == expected.runner.weights
    np.testing.assert_array_equal(scores(model), scores(expected))
    text = model.generate(TOKENS, decoding="auto(budget=8)", max_new_tokens=16)
    assert text.token_ids == expected.generate(TOKENS, max_new_tokens=16).token_ids
    np.testing.assert_array_equal(
        scores(shoestring.load(str(done.folder), device="cpu", quantize=quantize)), scores(model)
    )


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_gptq_keeps_the_calibrated_numbers(tmp_path, plain, quantize):
    done = quantize_model(str(plain), tmp_path / "small", quantize, calibration=TEXT, windows=3, device="cpu")
    made = describe_quantized(done.folder)["made"]
    assert (made["method"], made["windows"]) == (done.method, 3) == ("gptq", 3)
    pretrained = hub.load_pretrained(plain, dtype="float32")
    calibrated(pretrained.model, calibration_windows(pretrained.tokenizer, TEXT, 3), quantize)
    source = hub.open_source(done.folder)
    for name, matrix in quantized_matrices(done.folder, weight_shapes(source)).items():
        full = name if name.startswith("lm_head") else f"model.{name}"
        torch.testing.assert_close(
            unpack(matrix), pretrained.model.state_dict()[full], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}"
        )  # fmt: skip
    nearest = quantize_model(str(plain), tmp_path / "nearest", quantize)
    assert (done.folder / "quantized.safetensors").read_bytes() != (
        nearest.folder / "quantized.safetensors"
    ).read_bytes()


def test_modules_run_the_same_numbers_where_there_is_no_native_step(tmp_path, plain, monkeypatch):
    folder = str(quantize_model(str(plain), tmp_path / "small", "int8").folder)
    expected = scores(shoestring.load(folder, device="cpu", dtype="float32"))
    monkeypatch.setattr(native_runner, "why_not_built", lambda: "not here")
    model = shoestring.load(folder, device="cpu", dtype="float32")
    assert isinstance(model.runner, HFRunner)
    np.testing.assert_allclose(scores(model), expected, atol=0.02)  # the native step rounds activations
    rounded = shoestring.load(str(plain), device="cpu", dtype="float32")
    assert np.abs(scores(model) - scores(rounded)).max() > 1e-4, "nothing was rounded"
    monkeypatch.setattr("shoestring.model.quantizing.why_not_built", lambda: "not here")
    with pytest.raises(UnsupportedModelError, match="cannot be quantised here: not here"):
        quantize_model(str(plain), tmp_path / "other")


def test_single_rows_of_the_embedding_are_read(tmp_path, plain):
    folder = quantize_model(str(plain), tmp_path / "small", "int4").folder
    source = hub.open_source(folder)
    expected = unpack(quantized_matrices(folder, weight_shapes(source))["embed_tokens.weight"])
    index = [3, 250, 17, 258, 3]
    assert torch.equal(quantized_rows(source, "embed_tokens.weight", 64, index), expected[index])
    assert torch.equal(Base.of_source(source).rows(index), expected[index])


def test_misuse_is_a_line(tmp_path, plain):
    folder = quantize_model(str(plain), tmp_path / "small", "int4").folder
    with pytest.raises(RequestError, match="holds int4 weights, not int8: leave quantize out"):
        shoestring.load(str(folder), quantize="int8")
    with pytest.raises(RequestError, match="which an adapter cannot be merged into"):
        shoestring.load(str(folder), adapter="somewhere")
    with pytest.raises(RequestError, match="is quantised already"):
        quantize_model(str(folder), tmp_path / "again")
    with pytest.raises(RequestError, match="is there already"):
        quantize_model(str(plain), folder)
    with pytest.raises(RequestError, match="unknown quantize 'int5'"):
        quantize_model(str(plain), tmp_path / "other", "int5")
    with pytest.raises(RequestError, match="shorter than one window of 512 tokens"):
        quantize_model(str(plain), tmp_path / "other", calibration="short")
    with pytest.raises(UnsupportedModelError, match="name the model that they were made from"):
        hub.load_pretrained(folder)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "damage", ["cut", "no manifest", "another kind", "other types", "a tensor less", "config"]
)
def test_broken_folders_are_refused(tmp_path, plain, damage):
    folder = quantize_model(str(plain), tmp_path / "small", "int4").folder
    manifest = json.loads((folder / "shoestring.json").read_text())
    if damage == "cut":
        data = (folder / "quantized.safetensors").read_bytes()
        (folder / "quantized.safetensors").write_bytes(data[:-100])
    elif damage == "no manifest":
        (folder / "shoestring.json").unlink()
    elif damage == "another kind":
        manifest["types"]["norm.weight"] = "Q4_K"
    elif damage == "other types":
        manifest["types"]["layers.0.mlp.up_proj.weight"] = "INT8_TILES"
    elif damage == "a tensor less":
        del manifest["types"]["norm.weight"]
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    if damage in ("another kind", "other types", "a tensor less"):
        (folder / "shoestring.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelFileError, match="small"):
        shoestring.load(str(folder))


def test_an_interrupted_run_leaves_nothing(tmp_path, plain):
    def interrupt(stage, done, total):
        if stage == "pack" and done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(str(plain), tmp_path / "out" / "small", progress=interrupt)
    assert not list((tmp_path / "out").iterdir())


def test_windows_are_spread_over_the_text(tmp_path, plain):
    tokenizer = hub.load_pretrained(plain).tokenizer
    long = "".join(chr(97 + at // 5000) for at in range(100_000))
    windows = calibration_windows(tokenizer, long, 4, 256)
    assert windows.shape == (4, 256)
    letters = [tokenizer.decode(window[:1]) for window in windows]
    assert letters == sorted(letters)
    assert letters[0] == "a"
    assert letters[-1] >= "s"
    assert calibration_windows(tokenizer, TEXT[:1500], 9, 512).shape == (2, 512)
    with pytest.raises(RequestError, match="0 calibration windows"):
        calibration_windows(tokenizer, TEXT, 0)
    (tmp_path / "broken.xz").write_bytes(b"no such thing")
    with pytest.raises(RequestError, match=r"broken\.xz cannot be read"):
        read_calibration_text(tmp_path / "broken.xz")
