"""Weight matrices on the device, as the few-row kernels stream them: dense, int8 or int4 with a scale per 32 inputs.

The numbers are those of the CPU's tiles (`quantization`, native/quantized_pack.cpp): w = d * q in int8, w = d * q + m in
int4, d and m in float16, chosen by the same search in the same order of operations. Only the layout differs: a row's
integers lie together, so that 32 bytes (one sector of memory) are 32 int8 inputs of one group, or 64 int4 inputs of two
neighbouring groups, the first in the low halves of the bytes. All scales of these 64 inputs make one word, so that they can
be fetched ahead like the weights, and lie together for neighbouring outputs: a tile of them reads them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shoestring.errors import RequestError
from shoestring.quantization import WeightMatrix, WeightType, check_quantize
from shoestring.quantization.grids import GROUP, blocks_on_grid
from shoestring.quantization.packing import unpack_grid

__all__ = ["GROUP", "DeviceWeight", "join_weights", "pack_weight", "weight_of_tiles"]

_CHUNK = 1 << 22
"""Weights that are quantised at a time."""


@dataclass(frozen=True)
class DeviceWeight:
    """A matrix W [N, K] (N outputs, K inputs) on a device.

    Args:
        kind: "dense", "int8" or "int4".
        outputs, inputs: N and K.
        dtype: what products with it are computed in: bfloat16, float16 or float32.
        values: dense [N, K]; int8 [N, K] int8; int4 [N, bytes] uint8, 32 bytes for each two groups.
        scales: [groups / 2, N], float16 in a word, the first one lowest: int8's words are int32, the scales of two
            neighbouring groups; int4's are int64, each group's scale and minimum. Groups are K / 32 rounded up to an
            even number (the added one is zero).
    """

    kind: str
    outputs: int
    inputs: int
    dtype: torch.dtype
    values: Tensor
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "N K"]:
        """The matrix as the kernels see it, in `dtype` (its own where None)."""
        return self._dense(self.values, self.scales, dtype)

    def rows(self, index: Int[Tensor, " R"], dtype: torch.dtype | None = None) -> Float[Tensor, "R K"]:
        """Some of its rows, as of an embedding."""
        scales = None if self.scales is None else self.scales[:, index]
        return self._dense(self.values[index], scales, dtype)

    def _dense(self, values: Tensor, scales: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or self.dtype
        if scales is None:
            return values.to(dtype)
        halves = (
            scales.contiguous()
            .view(torch.float16)
            .float()
            .unflatten(1, (scales.shape[1], -1))
            .transpose(0, 1)
        )
        if self.kind == "int8":
            levels = values.unflatten(1, (-1, GROUP)).float()
            return (levels * halves.flatten(1)[:, : levels.shape[1], None]).flatten(1).to(dtype)
        halves = halves.unflatten(2, (2, 2)).flatten(1, 2)
        pairs = values.unflatten(1, (-1, 1, GROUP))
        levels = torch.cat([pairs & 15, pairs >> 4], 2).flatten(1, 2).float()
        found = levels * halves[:, :, :1] + halves[:, :, 1:]
        return found.flatten(1)[:, : self.inputs].to(dtype)


def pack_weight(
    weight: Float[Tensor, "N K"], quantize: str | None = None, dtype: torch.dtype | None = None
) -> DeviceWeight:
    """A weight on its device: as it is, or rounded to int8 or int4 there.

    Widths that are no multiple of 32 stay dense, as on the CPU.

    Args:
        dtype: what products are computed in; the weight's own where None.
    """
    check_quantize(quantize)
    outputs, inputs = weight.shape
    dtype = dtype or weight.dtype
    if quantize is None or inputs % GROUP:
        return DeviceWeight("dense", outputs, inputs, dtype, weight.detach().to(dtype).contiguous())
    rows = max(1, _CHUNK // inputs)
    parts = [blocks_on_grid(part.detach().float(), quantize) for part in weight.split(rows)]
    levels = torch.cat([part[0] for part in parts])  # [N, groups, 32]
    scales = torch.cat([part[1] for part in parts])  # [N, groups]
    if quantize == "int8":
        return _int8(levels, scales, inputs, dtype)
    return _int4(levels, scales, torch.cat([part[2] for part in parts]), inputs, dtype)


def weight_of_tiles(
    matrix: WeightMatrix, device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> DeviceWeight:
    """A matrix packed for the CPU (`quantization.pack`) laid out for the device, number for number."""
    if matrix.type not in (WeightType.INT8_TILES, WeightType.INT4_TILES):
        raise RequestError(
            f"weights of type {matrix.type.name} have no layout for the GPU: int8 or int4 tiles"
        )
    grid = unpack_grid(matrix)
    levels, scales = grid.levels.unflatten(1, (-1, GROUP)).to(device), grid.scales.to(device)
    if grid.minima is None:
        return _int8(levels, scales, matrix.cols, dtype)
    return _int4(levels, scales, grid.minima.to(device), matrix.cols, dtype)


def join_weights(parts: Sequence[DeviceWeight]) -> DeviceWeight:
    """Matrices of the same inputs as one, outputs one behind another."""
    first = parts[0]
    if any((one.kind, one.inputs, one.dtype) != (first.kind, first.inputs, first.dtype) for one in parts):
        raise RequestError("matrices of different kinds or inputs cannot be joined")
    scales = [one.scales for one in parts if one.scales is not None]
    return DeviceWeight(
        first.kind,
        sum(one.outputs for one in parts),
        first.inputs,
        first.dtype,
        torch.cat([one.values for one in parts]),
        torch.cat(scales, 1) if scales else None,
    )


def _int8(
    levels: Int[Tensor, "N groups 32"], scales: Tensor, inputs: int, dtype: torch.dtype
) -> DeviceWeight:
    words = torch.nn.functional.pad(scales, (0, scales.shape[1] % 2)).contiguous().view(torch.int32)
    return DeviceWeight(
        "int8", len(levels), inputs, dtype, levels.flatten(1).contiguous(), words.T.contiguous()
    )


def _int4(
    levels: Int[Tensor, "N groups 32"], scales: Tensor, minima: Tensor, inputs: int, dtype: torch.dtype
) -> DeviceWeight:
    outputs, groups = scales.shape
    odd = groups % 2
    pairs = torch.nn.functional.pad(levels, (0, 0, 0, odd)).unflatten(1, (-1, 2))
    values = pairs[:, :, 0] | pairs[:, :, 1] << 4
    words = torch.nn.functional.pad(torch.stack([scales, minima], 2), (0, 0, 0, odd))
    words = words.flatten(1).contiguous().view(torch.int64).T.contiguous()
    return DeviceWeight("int4", outputs, inputs, dtype, values.flatten(1).contiguous(), words)
