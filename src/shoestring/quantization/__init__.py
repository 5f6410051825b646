"""Weight-only quantisation: how matrices lie in memory and on disk, packed once for the kernels that read them."""

from shoestring.quantization.formats import QUANTIZE, WeightMatrix, WeightType, check_quantize
from shoestring.quantization.packed_folder import packed_matrices
from shoestring.quantization.packing import pack, weight_type_for

__all__ = [
    "QUANTIZE",
    "WeightMatrix",
    "WeightType",
    "check_quantize",
    "pack",
    "packed_matrices",
    "weight_type_for",
]
