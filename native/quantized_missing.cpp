// Stand-in for the quantised kernels until they are merged: there are none.
#include "quantized.hpp"

namespace shoestring {

const Kernel* find_quantized_kernel(WeightType, InstructionSet) { return nullptr; }
void prepare_int8_blocks(InstructionSet, const float*, int64_t, uint8_t*) {}
size_t int8_blocks_bytes(int64_t) { return 0; }
void dequantize_quantized_row(const Matrix&, int64_t, float*) {}
int64_t quantized_matrix_bytes(WeightType, int64_t, int64_t) { return -1; }

}  // namespace shoestring
