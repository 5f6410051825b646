"""A GGUF header -> the transformers configuration of the model, for the architectures that run as they lie in the file.

llama.cpp's converters leave out what its own code knows by architecture (which layers slide, the attention's scale); it is
said here. transformers' own reader knows more architectures and takes seconds.
"""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shoestring.errors import ModelFileError, UnsupportedModelError
from shoestring.hub.gguf_header import GgufHeader
from shoestring.hub.gguf_rope import mend_rope
from shoestring.hub.gguf_tokenizer import end_token_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

__all__ = ["ARCHITECTURES", "config_of_header", "generation_config_of_header"]

_LOCAL_ROPE_THETA = 10000.0  # Gemma 3's sliding layers; llama.cpp writes only the global one's
# The largest Gemmas scale attention by the hidden size's share of a head, not by the head's width.
_SCALED_BY_HIDDEN_SIZE = MappingProxyType({"gemma2": 46, "gemma3": 62})


def _llama(header: GgufHeader, common: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _plain(header: GgufHeader, common: dict[str, Any]) -> dict[str, Any]:
    return {}


def _gemma(header: GgufHeader, common: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh"}


def _sliding_gemma(header: GgufHeader, common: dict[str, Any]) -> dict[str, Any]:
    architecture = header.architecture
    head_dim = common["head_dim"]
    if common["num_hidden_layers"] == _SCALED_BY_HIDDEN_SIZE[architecture]:
        head_dim = common["hidden_size"] // common["num_attention_heads"]
    settings: dict[str, Any] = _gemma(header, common) | {"query_pre_attn_scalar": head_dim}
    window = header.metadata.get(f"{architecture}.attention.sliding_window")
    if window is not None:
        settings["sliding_window"] = int(window)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = header.metadata.get(f"{architecture}.{name}")
        if value is not None:
            settings[name] = float(value)
    if architecture == "gemma3":
        settings["rope_parameters"] = {
            "full_attention": common["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_ROPE_THETA},
        }
    return settings


# GGUF's architecture -> transformers' model type and what is its own.
ARCHITECTURES: MappingProxyType[str, tuple[str, Callable[[GgufHeader, dict[str, Any]], dict[str, Any]]]] = (
    MappingProxyType(
        {
            "llama": ("llama", _llama),
            "qwen2": ("qwen2", _plain),
            "qwen3": ("qwen3", _plain),
            "smollm3": ("smollm3", _plain),
            "gemma": ("gemma", _gemma),
            "gemma2": ("gemma2", _sliding_gemma),
            "gemma3": ("gemma3_text", _sliding_gemma),
        }
    )
)


def config_of_header(header: GgufHeader) -> "PretrainedConfig":
    """The configuration of a file of one of `ARCHITECTURES`.

    Raises:
        UnsupportedModelError: another architecture, or what of this one is not read (experts, partial rotation).
        ModelFileError: a number is missing or impossible.
    """
    from transformers import AutoConfig

    architecture = header.architecture
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(f"{header.path}: {architecture} files do not run as they lie")
    kind, own = ARCHITECTURES[architecture]
    numbers = _Numbers(header)
    hidden, heads = numbers.of("embedding_length"), numbers.of("attention.head_count")
    head_dim = numbers.of("attention.key_length", hidden // heads)
    if numbers.of("expert_count", 0, least=0):
        raise UnsupportedModelError(f"{header.path}: mixtures of experts do not run as they lie")
    if numbers.of("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{header.path}: it rotates a part of each head")
    if numbers.of("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{header.path}: its values and keys differ in width")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(f"{header.path} lacks the tensor token_embd.weight")
    queries, keys = heads * head_dim, numbers.of("attention.head_count_kv", heads) * head_dim
    last = numbers.of("block_count") - 1
    # The metadata's sizes are the tensors', which the file's own size bounds.
    for name, shape in {
        "token_embd.weight": (hidden, embedding.shape[1]),
        "blk.0.attn_q.weight": (hidden, queries),
        "blk.0.attn_k.weight": (hidden, keys),
        "blk.0.ffn_up.weight": (hidden, numbers.of("feed_forward_length")),
        f"blk.{last}.attn_q.weight": (hidden, queries),
    }.items():
        found = header.tensors.get(name)
        if found is None:
            raise ModelFileError(f"{header.path} lacks the tensor {name}: its weights are incomplete")
        if found.shape != shape:
            raise ModelFileError(
                f"{header.path} is a broken GGUF file: {name} is {list(found.shape)}, and its metadata says {list(shape)}"
            )
    theta = header.metadata.get(f"{architecture}.rope.freq_base", 10000.0)
    epsilon = header.metadata.get(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    for name, value in (("rope.freq_base", theta), ("attention.layer_norm_rms_epsilon", epsilon)):
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ModelFileError(f"{header.path}: its {name} is {value!r}")
    common: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": numbers.of("block_count"),
        "intermediate_size": numbers.of("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": numbers.of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": numbers.of("context_length"),
        "rms_norm_eps": float(epsilon),
        "vocab_size": embedding.shape[1],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
    }
    for name in ("bos", "pad"):
        key = "padding" if name == "pad" else name
        common[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    common["eos_token_id"] = end_token_ids(header) or None
    config = AutoConfig.for_model(kind, **(common | own(header, common)))
    mend_rope(config, header)
    return config


def generation_config_of_header(header: GgufHeader) -> "GenerationConfig":
    """The tokens that begin and end a text."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=header.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=end_token_ids(header) or None,
    )


class _Numbers:
    """Whole numbers of the metadata, each checked."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header

    def of(self, name: str, default: int | None = None, least: int = 1) -> int:
        key = f"{self.header.architecture}.{name}"
        value = self.header.metadata.get(key, default)
        if isinstance(value, list):
            raise UnsupportedModelError(f"{self.header.path}: its layers differ in {name}")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
            raise ModelFileError(f"{self.header.path} is a broken GGUF file: {key} is {value!r}")
        return value
