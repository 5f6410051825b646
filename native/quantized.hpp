// Few-row products with quantised weights: GGUF's block types as they lie in a file, and our own packed tiles.
//
// Every type is cut, along its inputs, into blocks of 32 weights w = d * q + m with small integers q. Activations are
// rounded to int8 in the same blocks, so that a block's dot product is one of integers:
//   sum_i w_i x_i = d * s * sum_i q_i a_i + m * s * sum_i a_i,   x_i = s * a_i.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.hpp"

namespace shoestring {

constexpr int kBlockCols = 32;  // weights (and activations) that share a scale
constexpr int kTileRows = 16;   // output rows that a tile of ours interleaves

// Blocks whose largest activation is below this are zero: its reciprocal would overflow.
constexpr float kSmallestActivation = 1e-30f;

// 32 activations, rounded symmetrically to int8. The biases undo the offset of weights stored as q + 128, which makes
// them the unsigned side of the u8 x s8 dot instructions; one for the upper half because q6_k has a scale per 16.
struct ActivationBlock {
  int8_t values[kBlockCols];
  float scale;
  float sum;          // scale * sum of values
  int32_t bias;       // -128 * sum of values
  int32_t bias_high;  // -128 * sum of values[16..32)
};
static_assert(sizeof(ActivationBlock) == 48, "prepared rows are arrays of these");

// Null where the type is none of ours. `cols` of every quantised type is a multiple of its block.
const Kernel* find_quantized_kernel(WeightType type, InstructionSet isa);

// Prepared activations: bytes of a row, and the rounding, which is bit for bit the same on every instruction set.
size_t int8_blocks_bytes(int64_t cols);
void prepare_int8_blocks(InstructionSet isa, const float* x, int64_t cols, uint8_t* out);

// The plain twin: row `row` of W as fp32.
void dequantize_quantized_row(const Matrix& w, int64_t row, float* out);

// Bytes of W; -1 where the type is none of ours or does not fit the shape.
int64_t quantized_matrix_bytes(WeightType type, int64_t rows, int64_t cols);

// Pack fp32 weights [rows, cols], cols a multiple of 32, into quantized_matrix_bytes(...) bytes. The last tile is
// filled up with rows of zeros. `int4_tiles` searches each block's scale and minimum for the least squared error.
void pack_int8_tiles(const float* w, int64_t rows, int64_t cols, uint8_t* out);
void pack_int4_tiles(const float* w, int64_t rows, int64_t cols, uint8_t* out);

namespace quantized {

// One per instruction set; null where a type has no kernel there (or the build none of that set).
const Kernel* portable_kernel(WeightType type);
const Kernel* avx2_kernel(WeightType type);
const Kernel* avx512_vnni_kernel(WeightType type);
const Kernel* neon_kernel(WeightType type);

void prepare_portable(const float* x, int64_t cols, ActivationBlock* out);
void prepare_avx512(const float* x, int64_t cols, ActivationBlock* out);

// This thread's scratch memory, 64-byte aligned, valid until its next call. Lives in a portable source: code compiled
// for a newer processor must not instantiate library templates that the linker may share with the rest.
uint8_t* scratch(size_t bytes);

}  // namespace quantized
}  // namespace shoestring
