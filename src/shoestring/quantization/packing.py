"""Float weights -> packed matrices: bfloat16, int8 or int4 in tiles of sixteen outputs, a scale per 32 inputs.

int8 rounds symmetrically to the nearest of 255 levels. int4 has a scale and a minimum per block, chosen for the least
squared error; the embedding and the head, to which a model is most sensitive, are int8 then.
"""

import numpy as np
import torch
from torch import Tensor

from shoestring.quantization.formats import WeightMatrix, WeightType
from shoestring.quantization.grids import GROUP, Grid

__all__ = ["pack", "pack_grid", "weight_type_for"]

_TILE = 16
_SENSITIVE = ("embed_tokens.weight", "lm_head.weight")


def weight_type_for(name: str, shape: tuple[int, ...], quantize: str | None) -> WeightType:
    """How a tensor of this name (HF's) and shape is packed; `quantize` None is bfloat16."""
    if len(shape) == 1:
        return WeightType.F32
    if quantize is None or shape[1] % GROUP:
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


def pack_grid(grid: Grid) -> WeightMatrix:
    """Pack a matrix whose integers and scales are known already (GPTQ's), number for number; `pack` would search anew."""
    rows, cols = grid.levels.shape
    spare = -rows % _TILE
    levels = grid.levels.cpu().to(torch.int16).unflatten(1, (-1, GROUP))
    halves = [grid.scales.cpu()]
    if grid.minima is None:
        kind, stored = WeightType.INT8_TILES, levels + 128
    else:
        kind, stored = WeightType.INT4_TILES, levels[:, :, :16] | levels[:, :, 16:] << 4
        halves.append(grid.minima.cpu())
    # In a tile and group: four neighbouring bytes of each of sixteen rows, then the next four; then the scales.
    empty = 128 if kind == WeightType.INT8_TILES else 0
    stored = torch.nn.functional.pad(stored, (0, 0, 0, 0, 0, spare), value=empty).to(torch.uint8)
    tiles = stored.unflatten(2, (-1, 4)).unflatten(0, (-1, _TILE)).permute(0, 2, 3, 1, 4).flatten(2)
    parts = [tiles]
    for numbers in halves:
        padded = torch.nn.functional.pad(numbers.to(torch.float16), (0, 0, 0, spare)).unflatten(
            0, (-1, _TILE)
        )
        parts.append(padded.transpose(1, 2).contiguous().view(torch.uint8))
    return WeightMatrix(kind, rows, cols, torch.cat(parts, 2).contiguous().flatten().numpy())
