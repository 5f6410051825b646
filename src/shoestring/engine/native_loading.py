"""From a model's files to the native step, without a module of PyTorch in between: weights are mapped where they lie.

A GGUF file's tensors and float32 safetensors are read as they are; others are packed once into the cache and mapped from
there, so that processes running the same model share one copy.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.engine import admission
from shoestring.engine.native_runner import NativeRunner, why_not
from shoestring.engine.native_weights import config_of, named_weights
from shoestring.errors import ModelFileError, UnsupportedModelError
from shoestring.hub import ModelSource
from shoestring.quantization import WeightMatrix, WeightType, pack, packed_matrices

__all__ = ["native_runner_of"]

# Architectures whose converter to GGUF permutes queries and keys, so that rotary pairs lie side by side.
_PERMUTED = frozenset({"llama", "smollm3"})
_TORCH_TYPES = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})


def native_runner_of(
    source: ModelSource,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
    **options: Any,
) -> NativeRunner:
    """The native step over a model's files.

    Args:
        dtype: float32 or bfloat16, of safetensors' weights; a GGUF's keep their own types.
        quantize: "int8" or "int4", of safetensors' weights.
        progress: called as ("pack", done, total) while weights are packed for the first time.
        options: see `NativeRunner`.

    Raises:
        UnsupportedModelError: the native part is missing or cannot run this model, or its tensors have other names.
        ModelFileError: a GGUF lacks a tensor, or has one of an impossible shape.
    """
    reason = why_not(source.config)
    if reason is not None:
        raise UnsupportedModelError(reason)
    skeleton = _skeleton(source.config)
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(skeleton).items()}
    if source.config.get_text_config(decoder=True).tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    _check(source, shapes)
    limit = admission.max_positions(skeleton)
    if source.gguf_architecture is None:
        config = config_of(skeleton, limit, dtype)
        return NativeRunner(config, _folder_matrices(source, shapes, dtype, quantize, progress), **options)
    all_float = all(source.tensors[name].dtype == "F32" for name in shapes)
    config = replace(
        config_of(skeleton, limit, torch.float32),
        adjacent_pairs=source.gguf_architecture in _PERMUTED,
        norm_adds_one=False,  # llama.cpp's converter has added it
        bf16_cache=not all_float,
    )
    return NativeRunner(config, _gguf_matrices(source, shapes), **options)


def _skeleton(config: Any) -> torch.nn.Module:
    """The architecture's module without weights; its buffers (rotary frequencies) are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _check(source: ModelSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    error = UnsupportedModelError if source.gguf_architecture is None else ModelFileError
    for name, shape in shapes.items():
        stored = source.tensors.get(name)
        if stored is None:
            raise error(f"{source.path} lacks the tensor {name!r}: its weights are incomplete")
        if stored.shape != shape:
            raise error(
                f"{source.path}: tensor {name!r} has the shape {list(stored.shape)}, and the model's is {list(shape)}"
            )
        if source.gguf_architecture is None and stored.dtype not in _TORCH_TYPES:
            raise error(f"{source.path}: tensor {name!r} is {stored.dtype}, not a float type")


def _folder_matrices(
    source: ModelSource,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    quantize: str | None,
    progress: Callable[[str, int, int | None], None] | None,
) -> dict[str, WeightMatrix]:
    maps = source.maps()

    def read(name: str) -> Tensor:
        # A copy, as PyTorch warns of memory that cannot be written.
        flat = torch.from_numpy(np.array(maps[name])).view(_TORCH_TYPES[source.tensors[name].dtype])
        return flat.view(shapes[name])

    if quantize is None and dtype == torch.float32:
        return {name: _float_matrix(maps[name], source.tensors[name].dtype, read, name) for name in shapes}
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip(".-")[-60:] or "model"
    return packed_matrices(f"{readable}-{source.fingerprint[:16]}", shapes, read, quantize, progress)


def _float_matrix(data: np.ndarray, kind: str, read: Callable[[str], Tensor], name: str) -> WeightMatrix:
    if kind != "F32":
        return pack(read(name), WeightType.F32)
    shape = read(name).shape
    rows, cols = shape if len(shape) == 2 else (1, shape[0])
    return WeightMatrix(WeightType.F32, rows, cols, data)


def _gguf_matrices(source: ModelSource, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightMatrix]:
    """Tensors as they lie; those of types without kernels become bfloat16."""
    maps = source.maps()
    matrices = {}
    for name, shape in shapes.items():
        kind = source.tensors[name].dtype
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        if kind in WeightType.__members__:
            matrices[name] = WeightMatrix(WeightType[kind], rows, cols, maps[name])
        else:
            matrices[name] = pack(_dequantized(maps[name], kind, rows, cols), WeightType.BF16_TILES)
    return matrices


def _dequantized(data: np.ndarray, kind: str, rows: int, cols: int) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    try:
        values = quants.dequantize(data.reshape(rows, -1), GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise UnsupportedModelError(f"GGUF tensors of type {kind} are not read") from error
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(rows, cols)
