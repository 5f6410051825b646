"""Float weights -> packed matrices: bfloat16, int8 or int4 in tiles of sixteen outputs, a scale per 32 inputs.

int8 rounds symmetrically to the nearest of 255 levels. int4 has a scale and a minimum per block, chosen for the least
squared error; the embedding and the head, to which a model is most sensitive, are int8 then.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoestring.quantization.formats import WeightMatrix, WeightType
from shoestring.quantization.grids import GROUP, Grid

__all__ = ["pack", "pack_grid", "unpack", "unpack_grid", "unpack_rows", "weight_type_for"]

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


def unpack(matrix: WeightMatrix) -> Tensor:
    """The numbers of a float32 matrix or of our own tiles: float32 [rows, cols], one row of float32 as a vector."""
    rows, cols = matrix.rows, matrix.cols
    data = torch.from_numpy(np.array(matrix.data, copy=True).view(np.uint8).reshape(-1))
    if matrix.type == WeightType.F32:
        values = data.view(torch.float32).view(rows, cols)
        return values[0] if rows == 1 else values
    if matrix.type == WeightType.BF16_TILES:
        pairs = data.view(torch.bfloat16).view(-1, -(-cols // 2), _TILE, 2)
        return pairs.transpose(1, 2).reshape(-1, pairs.shape[1] * 2)[:rows, :cols].float()
    return unpack_grid(matrix).dense()


def unpack_rows(matrix: WeightMatrix, index: Sequence[int]) -> Tensor:
    """Some rows [len(index), cols] of a matrix in our own tiles, without reading the others."""
    picked = [int(row) for row in index]
    tiles = matrix.data.reshape(-(-matrix.rows // _TILE), -1)[[row // _TILE for row in picked]]
    some = unpack(WeightMatrix(matrix.type, _TILE * len(picked), matrix.cols, tiles))
    return some[[_TILE * place + row % _TILE for place, row in enumerate(picked)]]


def unpack_grid(matrix: WeightMatrix) -> Grid:
    """`pack_grid` backwards: integers and scales of int8 or int4 tiles."""
    rows, groups = matrix.rows, matrix.cols // GROUP
    integers = 512 if matrix.type == WeightType.INT8_TILES else 256
    halves = 1 if matrix.type == WeightType.INT8_TILES else 2
    data = torch.from_numpy(np.array(matrix.data, copy=True).view(np.uint8).reshape(-1))
    tiles = data.view(-1, groups, integers + 2 * _TILE * halves)
    # [tiles, groups, fours, 16, 4] -> [rows, groups, bytes]
    stored = (
        tiles[:, :, :integers].unflatten(2, (-1, _TILE, 4)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(2)
    )
    numbers = tiles[:, :, integers:].contiguous().view(torch.float16).unflatten(2, (halves, _TILE))
    scales = numbers.permute(2, 0, 3, 1).flatten(1, 2)[:, :rows]
    stored = stored[:rows]
    if halves == 1:
        return Grid("int8", (stored.short() - 128).to(torch.int8).flatten(1), scales[0])
    return Grid("int4", torch.cat([stored & 15, stored >> 4], 2).flatten(1), scales[0], scales[1])
