import json
import os
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import shoestring.hub as hub
from shoestring.errors import ModelFileError, ShoestringError, UnsupportedModelError
from shoestring.hub.cache import whole_folder

Make = Callable[..., Path]


def test_gguf_is_converted_once_and_loads(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "my tiny.gguf")
    stages: list[str] = []
    folder = hub.resolve(path, progress=lambda stage, done, total: stages.append(stage))
    assert folder.parent == cache / "converted"
    assert {"hash", "convert"} == set(stages)
    stages.clear()
    assert hub.resolve(str(path), progress=lambda stage, done, total: stages.append(stage)) == folder
    assert stages == []  # neither hashed nor converted again
    assert not list(folder.parent.glob(".*"))
    manifest = json.loads((folder / "shoestring.json").read_text())
    assert manifest["source"]["path"] == str(path)
    pretrained = hub.load_pretrained(path, dtype="bfloat16")
    assert pretrained.model.dtype == torch.bfloat16
    assert not pretrained.model.training
    assert pretrained.model.generation_config.eos_token_id == [2, 0]


def test_weights_are_the_files(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    got = load_file(hub.resolve(path, dtype="float32") / "model.safetensors")
    want = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert np.array_equal(got["model.embed_tokens.weight"].numpy(), want["token_embd.weight"])
    down = got["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.array_equal(down, want["blk.1.ffn_down.weight"])
    # llama.cpp interleaves the two halves of each head that rotate together
    query = want["blk.1.attn_q.weight"].reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    assert np.array_equal(got["model.layers.1.self_attn.q_proj.weight"].numpy(), query)


def test_dtypes_have_their_own_folders(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    half, single = hub.resolve(path), hub.resolve(path, dtype="float32")
    assert half == hub.resolve(path, dtype="bfloat16") != single
    assert load_file(half / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert load_file(single / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_changed_file_is_converted_anew(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    first = hub.resolve(path)
    make_gguf(path, strings={"general.author": "another"})
    assert hub.resolve(path) != first


def test_broken_conversion_is_made_again(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    weights = hub.resolve(path) / "model.safetensors"
    whole = weights.stat().st_size
    os.truncate(weights, 1000)
    assert (hub.resolve(path) / "model.safetensors").stat().st_size == whole


def test_pre_tokenizers(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    def pieces(pre: str, text: str) -> list[str]:
        tokenizer = hub.load_pretrained(make_gguf(tmp_path / f"{pre}.gguf", pre=pre)).tokenizer
        assert tokenizer is not None
        ids = tokenizer("Hello <|im_end|> é\n", add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == "Hello <|im_end|> é\n"
        return [str(tokenizer.decode([token_id])) for token_id in tokenizer(text).input_ids]

    assert pieces("smollm", " 12<|im_end|>") == [" ", "1", "2", "<|im_end|>"]
    assert pieces("gpt-2", " 12<|im_end|>") == [" 1", "2", "<|im_end|>"]
    assert pieces("qwen2", " 12<|im_end|>") == [" ", "1", "2", "<|im_end|>"]
    # Llama 3 takes a word that the vocabulary holds whole, though no merges lead to it
    assert pieces("llama-bpe", "12hello") == ["<|im_start|>", "12", "hello"]
    assert pieces("qwen2", "hello") == ["he", "l", "l", "o"]


def test_bos_is_added_where_the_file_asks(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    for pre, asked, first in (
        ("gpt-2", True, 1),
        ("gpt-2", False, None),
        ("gpt-2", None, None),
        ("llama-bpe", None, 1),
        ("llama-bpe", False, None),
    ):
        flags = {} if asked is None else {"tokenizer.ggml.add_bos_token": asked}
        path = make_gguf(tmp_path / f"{pre}{asked}.gguf", pre=pre, flags=flags)
        tokenizer = hub.load_pretrained(path).tokenizer
        assert tokenizer is not None
        assert (tokenizer("x").input_ids[0] == 1) == (first == 1)


def test_llama3_rope_is_kept(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    scale = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scale}
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072}
    config = LlamaConfig(**sizes, rope_parameters={"rope_theta": 10000.0, **rope})
    plain = 1 / 10000.0 ** (np.arange(8) / 8)
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](config, None)[0].numpy()).astype(np.float32)
    assert factors.max() > 7
    path = make_gguf(tmp_path / "tiny.gguf", arrays={"rope_freqs.weight": factors})
    model = hub.load_pretrained(path).model
    assert rope.items() <= model.config.rope_parameters.items()
    path = make_gguf(tmp_path / "odd.gguf", arrays={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(UnsupportedModelError, match=r"odd\.gguf"):
        hub.resolve(path)


def test_linear_rope_is_kept_and_others_refused(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    floats = {"llama.rope.scaling.factor": 4.0}
    path = make_gguf(tmp_path / "a.gguf", strings={"llama.rope.scaling.type": "linear"}, floats=floats)
    rope = hub.load_pretrained(path).model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)
    path = make_gguf(tmp_path / "b.gguf", strings={"llama.rope.scaling.type": "longrope"}, floats=floats)
    with pytest.raises(UnsupportedModelError, match="longrope"):
        hub.resolve(path)


def test_missing_tensor_is_refused(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "tiny.gguf", drop="blk.1.ffn_up.weight")
    with pytest.raises(ModelFileError, match=r"tiny\.gguf lacks the tensor .*layers\.1\.mlp\.up_proj"):
        hub.resolve(path)
    assert not list((cache / "converted").iterdir())


def test_unknown_architecture(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "tiny.gguf", architecture="quux")
    with pytest.raises(ModelFileError, match=r"tiny\.gguf: transformers cannot convert .* 'quux'") as caught:
        hub.resolve(path)
    assert "\n" not in str(caught.value)


def _broken(whole: bytes, kind: str) -> bytes:
    match kind:
        case "magic":
            return b"GGML" + whole[4:]
        case "empty":
            return b""
        case "magic only":
            return b"GGUF"
        case "version":
            return whole[:4] + struct.pack("<I", 77) + whole[8:]
        case "tensor count":
            return whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:]
        case "pair count":
            return whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:]
        case "key length":
            return whole[:24] + struct.pack("<Q", 1 << 63) + whole[32:]
        case "header cut":
            return whole[:200]
    return whole[:-100]


KINDS = ["magic", "empty", "magic only", "version", "tensor count", "pair count", "key length", "header cut"]
KINDS.append("data cut")


@pytest.mark.parametrize("kind", KINDS)
def test_broken_file_is_one_line_naming_it(tmp_path: Path, cache: Path, make_gguf: Make, kind: str) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(_broken(path.read_bytes(), kind))
    with pytest.raises(ModelFileError, match=r"tiny\.gguf") as caught:
        hub.resolve(path)
    assert "\n" not in str(caught.value)


def test_split_file_is_refused(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "big-00001-of-00003.gguf")
    with pytest.raises(ModelFileError, match=r"big-00001-of-00003\.gguf is one part of a split GGUF"):
        hub.resolve(path)


def test_no_disk_space(tmp_path: Path, cache: Path, make_gguf: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 88, 12))
    with pytest.raises(
        ShoestringError, match=r"converting tiny\.gguf needs \d+ bytes in .*, and 12 are free"
    ):
        hub.resolve(path)


def test_neighbours_of_the_file_take_no_part(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{{ broken")
    assert hub.load_pretrained(path).tokenizer is not None


def test_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    leftover = tmp_path / ".target.part-killed"
    leftover.mkdir()

    def write() -> None:
        with whole_folder(tmp_path / "target") as part:
            assert not leftover.exists()
            (part / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


def test_two_processes_convert_once(tmp_path: Path, cache: Path, make_gguf: Make) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    script = (
        "import sys, shoestring.hub as hub; seen = []\n"
        "print(hub.resolve(sys.argv[1], progress=lambda stage, *_: seen.append(stage)))\n"
        "print(seen.count('convert'))"
    )
    command = [sys.executable, "-c", script, str(path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert answers[0][0] == answers[1][0]
    assert sorted(answer[1] for answer in answers) == ["0", "2"]


@pytest.mark.parametrize(
    "name", ["feed_forward_length", "embedding_length", "block_count", "rope.dimension_count"]
)
def test_sizes_that_no_tensor_has_are_refused_before_conversion(
    tmp_path: Path, cache: Path, make_gguf: Make, name: str
) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    whole, key = path.read_bytes(), f"llama.{name}".encode()
    value = whole.index(key) + len(key) + 4  # behind the type
    path.write_bytes(whole[:value] + struct.pack("<I", 1 << 30) + whole[value + 4 :])
    with pytest.raises(ModelFileError, match=rf"tiny\.gguf is a broken GGUF file: {name} is {1 << 30}"):
        hub.resolve(path)
