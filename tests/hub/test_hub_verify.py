import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring.errors import ModelFileError
from shoestring.hub import verify_folder

Edit = Callable[[Path, Callable[[Any], Any]], None]


def test_whole_folders_pass(llama: Path, sharded: Path) -> None:
    assert verify_folder(llama) == llama
    assert verify_folder(str(sharded)) == sharded


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelFileError, match=shard.name):
        verify_folder(sharded)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "a/b.safetensors", "a\\b.safetensors", "x.bin", 3])
def test_shard_outside_the_folder_is_refused(sharded: Path, edit_json: Edit, shard: object) -> None:
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].update({"lm_head.weight": shard}))
    with pytest.raises(ModelFileError, match="not a file name in its folder"):
        verify_folder(sharded)


def test_tensor_that_its_shard_lacks_is_named(sharded: Path, edit_json: Edit) -> None:
    shard = min(path.name for path in sharded.glob("model-*.safetensors"))
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].update({"absent.weight": shard}))
    with pytest.raises(ModelFileError, match=r"lacks tensor 'absent\.weight'"):
        verify_folder(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(llama: Path, keep: int) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match=r"model\.safetensors is broken"):
        verify_folder(llama)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[" * 5000,
        b"[]",
        {"a": {**ENTRY, "dtype": "F31"}},
        {"a": {**ENTRY, "shape": [3]}},
        {"a": {**ENTRY, "shape": [-2]}},
        {"a": {**ENTRY, "shape": ["2"]}},
        {"a": {**ENTRY, "data_offsets": [8, 16]}},
        {"a": {**ENTRY, "data_offsets": [-8, 0]}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": 7},
        {"a": ENTRY, "b": ENTRY},
        {},
    ],
)
def test_broken_safetensors_header(llama: Path, header: Any) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        verify_folder(llama)


def test_absurd_header_length(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + bytes(64))
    with pytest.raises(ModelFileError, match="cannot hold its header"):
        verify_folder(llama)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_reason(llama: Path, name: str) -> None:
    (llama / "model.safetensors").rename(llama / name)
    with pytest.raises(ModelFileError, match="pickles can run code"):
        verify_folder(llama)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": 3}', "\x00"])
def test_broken_config_is_named(llama: Path, content: str) -> None:
    (llama / "config.json").write_text(content)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        verify_folder(llama)


def test_folder_without_config_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no config\.json, so it is not a model folder"):
        verify_folder(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ModelFileError, match=r"holds x\.gguf: name that file"):
        verify_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="is an adapter"):
        verify_folder(tmp_path)
    with pytest.raises(ModelFileError, match="is not a folder"):
        verify_folder(tmp_path / "absent")


def test_folder_without_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"no model\.safetensors"):
        verify_folder(llama)
    shutil.rmtree(llama)
