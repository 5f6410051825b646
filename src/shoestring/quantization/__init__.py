"""Weight-only quantisation: how matrices lie in memory and on disk, packed once for the kernels that read them."""

from shoestring.quantization.formats import QUANTIZE, WeightMatrix, WeightType, check_quantize
from shoestring.quantization.gptq import calibrated, gptq, rounded
from shoestring.quantization.grids import Grid, round_to_nearest
from shoestring.quantization.packed_folder import packed_matrices
from shoestring.quantization.packing import pack, pack_grid, weight_type_for

__all__ = [
    "QUANTIZE",
    "Grid",
    "WeightMatrix",
    "WeightType",
    "calibrated",
    "check_quantize",
    "gptq",
    "pack",
    "pack_grid",
    "packed_matrices",
    "round_to_nearest",
    "rounded",
    "weight_type_for",
]
