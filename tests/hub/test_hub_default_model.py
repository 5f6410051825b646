import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

import shoestring.hub as hub
from shoestring.hub.download import fetch_bundled

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def default(default_folder: Path) -> hub.Pretrained:
    return hub.load_pretrained("smollm2-135m")


def test_completes_sensibly(default: hub.Pretrained) -> None:
    assert default.tokenizer is not None
    prompt = default.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        ids = default.model.generate(**prompt, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert "Paris" in default.tokenizer.decode(ids[0])


def test_tokenizer_facts(default: hub.Pretrained) -> None:
    tokenizer = default.tokenizer
    assert tokenizer is not None
    assert tokenizer.convert_ids_to_tokens(tokenizer("12345").input_ids) == list("12345")
    assert tokenizer("a 12").input_ids == tokenizer.convert_tokens_to_ids(["a", "Ġ", "1", "2"])
    for at, marker in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]):
        assert tokenizer(marker).input_ids == [at]
    for text in ("Hello world", "naïve 日本語 🙂\n\n\tx  y"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert default.model.generation_config.eos_token_id == [2, 0]


def test_weights_are_the_dequantised_ones(default_folder: Path) -> None:
    source = {
        tensor.name: tensor for tensor in gguf.GGUFReader(fetch_bundled(hub.BUNDLED["smollm2-135m"])).tensors
    }

    def want(name: str) -> np.ndarray:
        return gguf.dequantize(source[name].data, source[name].tensor_type)

    query = want("blk.3.attn_q.weight").reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    pairs = {
        "model.embed_tokens.weight": want("token_embd.weight"),
        "model.layers.7.mlp.down_proj.weight": want("blk.7.ffn_down.weight"),
        "model.layers.3.self_attn.q_proj.weight": query,
        "model.norm.weight": want("output_norm.weight"),
    }
    with safe_open(default_folder / "model.safetensors", framework="pt") as file:
        for name, array in pairs.items():
            assert torch.equal(file.get_tensor(name), torch.from_numpy(array.copy()).bfloat16()), name


def test_warm_load_is_quick(default: hub.Pretrained) -> None:
    start = time.perf_counter()
    hub.load_pretrained("smollm2-135m")
    assert time.perf_counter() - start < 3


def test_importing_the_room_is_quick() -> None:
    heavy = "{'torch', 'transformers', 'gguf', 'huggingface_hub', 'numpy'}"
    script = f"import sys, shoestring.hub; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_listed_as_local(default_folder: Path) -> None:
    info = next(model for model in hub.list_models() if model.name == "smollm2-135m")
    assert info.local
    assert info.kind == "bundled"
    assert info.path is not None
