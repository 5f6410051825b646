"""A model on this machine, described but not loaded: its configuration, its tokenizer, and where its tensors lie."""

import hashlib
import json
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shoestring.errors import ModelFileError, UnsupportedModelError
from shoestring.hub.cache import Progress
from shoestring.hub.gguf_config import config_of_header, generation_config_of_header
from shoestring.hub.gguf_header import read_gguf_header
from shoestring.hub.gguf_tokenizer import tokenizer_of_header
from shoestring.hub.pretrained import load_config, load_tokenizer
from shoestring.hub.quiet import quiet_transformers
from shoestring.hub.resolving import check_dtype, find_gguf, resolve
from shoestring.hub.verify import QUANTIZED_WEIGHTS, StoredTensor, is_quantized, read_json, stored_tensors

if TYPE_CHECKING:
    import numpy as np
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["ModelSource", "open_folder", "open_gguf", "open_source"]

# llama.cpp's names -> transformers', below the decoder.
_GGUF_NAMES = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_norm": "post_attention_layernorm",
    }
)
# With four norms a layer, the one before the feedforward has a name of its own.
_FOUR_NORMS = MappingProxyType(
    {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
_GGUF_ENDS = MappingProxyType({"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"})
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A causal language model whose weights stay where they are.

    Args:
        tensors: by transformers' names, below the decoder (`layers.0...`); those of a GGUF have ggml's types.
        gguf_architecture: None where the weights are safetensors.
        quantized: the tensors are bytes that `quantization.quantized_matrices` reads.
    """

    name: str
    path: Path
    config: "PretrainedConfig"
    generation_config: "GenerationConfig | None"
    tokenizer: "PreTrainedTokenizerBase | None"
    tensors: Mapping[str, StoredTensor]
    gguf_architecture: str | None = None
    quantized: bool = False

    def maps(self) -> "Mapping[str, np.ndarray]":
        """Every tensor's bytes, memory-mapped: files are read where and when they are looked at."""
        import numpy as np

        views: dict[Path, mmap.mmap] = {}
        for path in {tensor.path for tensor in self.tensors.values()}:
            with path.open("rb") as file:
                views[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            name: np.frombuffer(views[tensor.path], np.uint8, tensor.nbytes, tensor.start)
            for name, tensor in self.tensors.items()
        }

    @property
    def fingerprint(self) -> str:
        """What changes when one of the files does: their names, sizes and times, and the configuration."""
        files = {}
        for path in sorted({tensor.path.resolve() for tensor in self.tensors.values()}):
            stat = path.stat()
            files[str(path)] = (stat.st_size, stat.st_mtime_ns)
        facts = json.dumps([files, self.config.to_dict()], sort_keys=True, default=str)
        return hashlib.sha256(facts.encode()).hexdigest()[:32]


def open_source(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Describe the model of a name that `resolve` knows, fetched where it is not here.

    A GGUF is read as it lies, unless `dtype` or `quantize` asks for other weights or its architecture must be converted.

    Raises:
        RequestError, DownloadError, ModelFileError, UnsupportedModelError: as `load_pretrained`.
    """
    check_dtype(dtype)
    as_it_lies = dtype == "auto" and quantize is None and revision is None
    if as_it_lies and (path := find_gguf(name, progress)) is not None:
        try:
            return open_gguf(path, str(name))
        except UnsupportedModelError:
            pass  # transformers may convert it
    folder = resolve(name, revision=revision, dtype=dtype, progress=progress)
    return open_folder(folder, str(name))


def open_gguf(path: Path, name: str) -> ModelSource:
    """Describe a GGUF model (all parts of a split one) of a known architecture.

    Raises:
        ModelFileError: it is broken.
        UnsupportedModelError: it does not run as it lies; converted, it may.
    """
    header = read_gguf_header(path)
    with quiet_transformers():
        config = config_of_header(header)
        tokenizer = tokenizer_of_header(header)
        defaults = generation_config_of_header(header)
    tensors = {}
    four_norms = "blk.0.post_ffw_norm.weight" in header.tensors
    for entry in header.tensors.values():
        ours = _hf_name(entry.name, four_norms)
        if ours is not None:
            kind = _ggml_type_name(entry.ggml_type)
            tensors[ours] = StoredTensor(entry.path, kind, entry.shape[::-1], entry.start, entry.nbytes)
    return ModelSource(
        name=name,
        path=path,
        config=config,
        generation_config=defaults,
        tokenizer=tokenizer,
        tensors=tensors,
        gguf_architecture=header.architecture,
    )


def open_folder(folder: Path, name: str) -> ModelSource:
    """Describe a verified folder of safetensors.

    Raises:
        ModelFileError: it is broken.
        UnsupportedModelError: transformers has no causal language model of its type.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    stored: dict[str, StoredTensor] = {}
    quantized = is_quantized(folder)
    if single.is_file():
        stored = stored_tensors(single)
    elif quantized:
        stored = stored_tensors(folder / QUANTIZED_WEIGHTS)
    else:
        weight_map: dict[str, str] = read_json(index)["weight_map"]
        for shard in sorted(set(weight_map.values())):
            held = stored_tensors(folder / shard)
            stored |= {key: tensor for key, tensor in held.items() if weight_map.get(key) == shard}
    return ModelSource(
        name=name,
        path=folder,
        config=load_config(folder),
        generation_config=_generation_config(folder),
        tokenizer=load_tokenizer(folder),
        tensors={key.removeprefix("model."): tensor for key, tensor in stored.items()},
        quantized=quantized,
    )


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    with quiet_transformers():
        try:
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ModelFileError(f"{folder / 'generation_config.json'} cannot be read: {error}") from error


def _hf_name(name: str, four_norms: bool) -> str | None:
    """Transformers' name of a GGUF tensor below the decoder; None for those that are no weights (rope factors)."""
    if block := _BLOCK.fullmatch(name):
        names = dict(_GGUF_NAMES) | (dict(_FOUR_NORMS) if four_norms else {})
        ours = names.get(block[2])
        return f"layers.{block[1]}.{ours or block[2]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_GGUF_ENDS[stem]}.{kind}" if stem in _GGUF_ENDS else None


def _ggml_type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(number).name)
