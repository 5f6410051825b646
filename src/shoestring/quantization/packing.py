"""Float weights -> packed matrices: bfloat16, int8 or int4 in tiles of sixteen outputs, a scale per 32 inputs.

int8 rounds symmetrically to the nearest of 255 levels. int4 has a scale and a minimum per block, chosen for the least
squared error; the embedding and the head, to which a model is most sensitive, are int8 then.
"""

import numpy as np
import torch
from torch import Tensor

from shoestring.quantization.formats import WeightMatrix, WeightType

__all__ = ["pack", "weight_type_for"]

_BLOCK = 32
_SENSITIVE = ("embed_tokens.weight", "lm_head.weight")


def weight_type_for(name: str, shape: tuple[int, ...], quantize: str | None) -> WeightType:
    """How a tensor of this name (HF's) and shape is packed; `quantize` None is bfloat16."""
    if len(shape) == 1:
        return WeightType.F32
    if quantize is None or shape[1] % _BLOCK:
        return WeightType.BF16_TILES
    if quantize == "int8" or name in _SENSITIVE:
        return WeightType.INT8_TILES
    return WeightType.INT4_TILES


def pack(weight: Tensor, kind: WeightType) -> WeightMatrix:
    """Pack a float weight [rows, cols] on the CPU (or a vector, as one row) as `kind`, one of our own types or F32."""
    from shoestring import _native

    rows, cols = weight.shape if weight.dim() == 2 else (1, weight.shape[0])
    if kind == WeightType.F32:
        return WeightMatrix(kind, rows, cols, weight.float().contiguous().view(rows, cols).numpy())
    if kind == WeightType.BF16_TILES:
        halves = weight.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        return WeightMatrix(kind, rows, cols, _native.pack_bf16_tiles(halves, rows, cols))
    data = np.empty(_native.quantized_matrix_bytes(int(kind), rows, cols), np.uint8)
    _native.quantized_pack(int(kind), weight.float().contiguous().numpy(), data)
    return WeightMatrix(kind, rows, cols, data)
