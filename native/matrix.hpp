// A weight matrix as it lies in memory, and the one face of all few-row matrix kernels.
//
// y = x W^T, where W has `rows` outputs of `cols` inputs. Kernels are single-threaded over a range of W's rows, so
// that the step can divide the rows among the threads of its pool. Activations are prepared once per matrix input
// (rounded to bfloat16, or quantised to 8 bits in blocks) and then used by every matrix that reads them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shoestring {

// GGUF's own types keep ggml's numbers; ours begin at 1000.
enum class WeightType : int32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  bf16 = 30,
  bf16_tiles = 1000,  // bfloat16, packed in tiles of output rows for the dot-product instructions
  int8_tiles = 1001,  // weight-only int8, a scale per group of inputs, packed in tiles of output rows
  int4_tiles = 1002,  // weight-only int4, scale and minimum per group of inputs, packed in tiles of output rows
};

struct Matrix {
  WeightType type;
  int64_t rows;         // outputs
  int64_t cols;         // inputs
  const uint8_t* data;  // may be unaligned (memory-mapped files)
};

// What a kernel wants of its activations. Matrices with equal formats share prepared rows.
enum class ActivationFormat : int32_t { f32, bf16, int8_blocks };

// The instruction sets that kernels are written for, best last; chosen once, at run time.
enum class InstructionSet : int32_t { portable, avx2, avx512, avx512_bf16_vnni, neon };

struct Kernel {
  ActivationFormat activations;
  // Single-threaded: y[t * y_stride + r] for t in [0, T) and r in [first, last), accumulated in fp32.
  // `x` holds T prepared rows, `x_stride` bytes apart. `first` is a multiple of `row_multiple`.
  void (*multiply)(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
                   int64_t y_stride);
  int row_multiple;
};

// The kernel for a type on an instruction set; falls back to the portable one. Null for a type without kernels.
const Kernel* find_kernel(WeightType type, InstructionSet isa);

size_t prepared_bytes(ActivationFormat format, int64_t cols);
void prepare_row(ActivationFormat format, InstructionSet isa, const float* x, int64_t cols, uint8_t* out);

// The plain twin: row `row` of W as fp32, by the format's definition.
void dequantize_row(const Matrix& w, int64_t row, float* out);

// Bytes of W, or -1 where the type does not fit the shape (cols not a multiple of the block).
int64_t matrix_bytes(WeightType type, int64_t rows, int64_t cols);

}  // namespace shoestring
