"""How a weight matrix lies in memory: GGUF's block types as they are, and our own packed tiles."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from shoestring.errors import RequestError, suggest

__all__ = ["QUANTIZE", "WeightMatrix", "WeightType", "check_quantize", "packed_bytes"]

QUANTIZE = ("int8", "int4")
"""What `load(quantize=)` takes."""


class WeightType(IntEnum):
    """How a matrix lies in memory; GGUF's types keep ggml's numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30
    BF16_TILES = 1000
    INT8_TILES = 1001
    INT4_TILES = 1002


@dataclass(frozen=True)
class WeightMatrix:
    """A weight `[rows, cols]` as it lies in `data`, any contiguous buffer (an array, a memory-mapped file's part).

    Norms and biases are matrices of one row.
    """

    type: WeightType
    rows: int
    cols: int
    data: Any


def packed_bytes(kind: WeightType, rows: int, cols: int) -> int:
    """Bytes of a float32 matrix, or of one in our own tiles of sixteen rows."""
    if kind == WeightType.F32:
        return 4 * rows * cols
    tiles = -(-rows // 16)
    if kind == WeightType.BF16_TILES:
        return tiles * -(-cols // 2) * 64
    return tiles * (cols // 32) * {WeightType.INT8_TILES: 544, WeightType.INT4_TILES: 320}[kind]


def check_quantize(quantize: str | None) -> str | None:
    """Return `quantize` if it is None or one of `QUANTIZE`, else raise RequestError."""
    if quantize is not None and quantize not in QUANTIZE:
        raise RequestError(
            f"unknown quantize {quantize!r}{suggest(str(quantize), QUANTIZE)}: one of {', '.join(QUANTIZE)}"
        )
    return quantize
