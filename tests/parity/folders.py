"""Tiny random models on disk: a GGUF file and a folder of safetensors with a byte-level tokenizer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, LAYERS, HEADS, KV_HEADS, FEEDFORWARD = 64, 2, 4, 2, 128
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gguf(
    path: Path,
    *,
    pre: str = "smollm",
    drop: str = "",
    kind: str = "F32",
    biases: bool = False,
    head_norms: bool = False,
    gemma: bool = False,
    split_max_tensors: int = 0,
    **extra: Any,
) -> Path:
    """A random two-layer Llama with a byte-level vocabulary of single bytes, ' 1', '12' and two markers.

    `kind`: ggml's type of the matrices. `biases`, `head_norms`, `gemma`: what Qwen 2, Qwen 3 and Gemma 3 have besides.
    """
    random = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "Ġ1", "12", "he", "hello"]
    writer = gguf.GGUFWriter(path, extra.pop("architecture", "llama"), split_max_tensors=split_max_tensors)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEEDFORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ 1", "1 2", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in extra.pop("strings", {}).items():
        writer.add_string(key, value)
    for key, value in extra.pop("flags", {}).items():
        writer.add_bool(key, value)
    for key, value in extra.pop("floats", {}).items():
        writer.add_float32(key, value)

    tensors = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        tensors |= {block + "attn_norm.weight": (WIDTH,), block + "ffn_norm.weight": (WIDTH,)}
        tensors |= {block + name: (WIDTH, WIDTH) for name in ("attn_q.weight", "attn_output.weight")}
        tensors |= {block + name: (WIDTH // 2, WIDTH) for name in ("attn_k.weight", "attn_v.weight")}
        tensors |= {block + name: (FEEDFORWARD, WIDTH) for name in ("ffn_gate.weight", "ffn_up.weight")}
        tensors[block + "ffn_down.weight"] = (WIDTH, FEEDFORWARD)
        if biases:
            widths = {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2}
            tensors |= {f"{block}{name}.bias": (width,) for name, width in widths.items()}
        if head_norms or gemma:
            tensors |= {
                block + name: (WIDTH // HEADS,) for name in ("attn_q_norm.weight", "attn_k_norm.weight")
            }
        if gemma:
            tensors |= {
                block + name: (WIDTH,) for name in ("post_attention_norm.weight", "post_ffw_norm.weight")
            }
    if gemma:
        writer.add_sliding_window(8)
        writer.add_key_length(WIDTH // HEADS)
        writer.add_value_length(WIDTH // HEADS)
    for name, shape in tensors.items():
        if name == drop:
            continue
        values = random.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, _quantised(values, stored, random), raw_dtype=stored)
    for name, array in extra.pop("arrays", {}).items():
        writer.add_tensor(name, array)
    assert not extra
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))[0] if split_max_tensors else path


def _quantised(values: np.ndarray, kind: gguf.GGMLQuantizationType, random: np.random.Generator) -> Any:
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:  # blocks of random bits behind a half-precision scale
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (values.shape[0], values.shape[1] // block, nbytes), dtype=np.uint8)
        data[:, :, :2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        return data.reshape(values.shape[0], -1)


def write_llama(folder: Path, *, shard_size: str = "5GB", tokenizer: bool = True, chat: bool = False) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=WIDTH,
        intermediate_size=FEEDFORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        vocabulary = {token: at for at, token in enumerate(byte_alphabet())}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=backend)
        if chat:
            fast.chat_template = CHAT_TEMPLATE
        fast.save_pretrained(folder)
    return folder
