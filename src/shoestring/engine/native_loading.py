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
from shoestring.quantization import (
    WeightMatrix,
    WeightType,
    pack,
    packed_matrices,
    quantized_matrices,
    unpack,
)

__all__ = ["module_of_matrices", "native_runner_of", "stored_tensor", "weight_shapes"]

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
    shapes = weight_shapes(source, skeleton)
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


def weight_shapes(source: ModelSource, skeleton: torch.nn.Module | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model's configuration asks for, by its name below the decoder.

    Args:
        skeleton: the architecture's module without weights; None: made anew.

    Raises:
        UnsupportedModelError: safetensors of other names or shapes.
        ModelFileError: a GGUF lacks a tensor, or has one of an impossible shape.
    """
    skeleton = _skeleton(source.config) if skeleton is None else skeleton
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(skeleton).items()}
    if source.config.get_text_config(decoder=True).tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    if not source.quantized:
        _check(source, shapes)
    return shapes


def module_of_matrices(
    source: ModelSource, matrices: Mapping[str, WeightMatrix], dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """transformers' module with the numbers that packed matrices stand for."""
    module: Any = _skeleton(source.config)
    prefix = f"{module.base_model_prefix}."
    own = dict(module.named_parameters())
    weights = {}
    for name, matrix in matrices.items():
        full = next(one for one in (prefix + name, name) if one in own)
        weights[full] = unpack(matrix).to(device=device, dtype=dtype)
    module.load_state_dict(weights, strict=False, assign=True)
    module.tie_weights()
    if absent := [name for name, weight in module.named_parameters() if weight.is_meta]:
        raise UnsupportedModelError(f"{source.path} has no weights for {absent[0]!r}")
    module.to(device)
    ready: torch.nn.Module = module.eval()
    return ready


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
    if source.quantized:
        return quantized_matrices(source.path, shapes)
    maps = source.maps()

    def read(name: str) -> Tensor:
        return stored_tensor(source, maps, name, shapes[name])

    if quantize is None and dtype == torch.float32:
        return {name: _float_matrix(maps[name], source.tensors[name].dtype, read, name) for name in shapes}
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip(".-")[-60:] or "model"
    return packed_matrices(f"{readable}-{source.fingerprint[:16]}", shapes, read, quantize, progress)


def stored_tensor(
    source: ModelSource, maps: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]
) -> Tensor:
    """A copy of a float tensor of safetensors, as PyTorch warns of memory that cannot be written."""
    flat = torch.from_numpy(np.array(maps[name])).view(_TORCH_TYPES[source.tensors[name].dtype])
    return flat.view(shape)


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
