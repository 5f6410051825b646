// Stand-in for the quantised kernels' header until they are merged.
#pragma once

#include "matrix.hpp"

namespace shoestring {

const Kernel* find_quantized_kernel(WeightType type, InstructionSet isa);
void prepare_int8_blocks(InstructionSet isa, const float* x, int64_t cols, uint8_t* out);
size_t int8_blocks_bytes(int64_t cols);
void dequantize_quantized_row(const Matrix& w, int64_t row, float* out);
int64_t quantized_matrix_bytes(WeightType type, int64_t rows, int64_t cols);

}  // namespace shoestring
