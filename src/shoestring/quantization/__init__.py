"""Weight-only quantisation: how matrices lie in memory and on disk, packed once for the kernels that read them."""

from shoestring.quantization.formats import QUANTIZE, WeightMatrix, WeightType, check_quantize
from shoestring.quantization.gptq import calibrated, gptq, rounded
from shoestring.quantization.grids import Grid, round_to_nearest
from shoestring.quantization.packed_folder import packed_matrices
from shoestring.quantization.packing import pack, pack_grid, unpack, weight_type_for
from shoestring.quantization.quantized_folder import (
    copy_beside,
    describe_quantized,
    quantized_matrices,
    quantized_rows,
    require_new,
    write_quantized,
)

__all__ = [
    "QUANTIZE",
    "Grid",
    "WeightMatrix",
    "WeightType",
    "calibrated",
    "check_quantize",
    "copy_beside",
    "describe_quantized",
    "gptq",
    "pack",
    "pack_grid",
    "packed_matrices",
    "quantized_matrices",
    "quantized_rows",
    "require_new",
    "round_to_nearest",
    "rounded",
    "unpack",
    "weight_type_for",
    "write_quantized",
]
