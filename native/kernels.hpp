// The table of vector kernels that each instruction set's translation unit fills in.
#pragma once

#include <cstdint>

#include "matrix.hpp"

namespace shoestring {

enum class Activation : int32_t { silu, gelu_tanh };

// The best of the logits seen so far; ties go to the lower token.
struct Best {
  float value;
  int32_t token;
  bool finite;  // false once a NaN or an infinity was seen
};

// One key-value head's cached keys and values, in tiles of sixteen slots (keys) and of sixteen dimensions (values):
//   float:    keys [slots/16][D][16],       values [slots][D']
//   bfloat16: keys [slots/16][D/2][16][2],  values [slots/2][D'][2]
// where D' is D rounded up to a multiple of sixteen.
struct HeadCache {
  uint8_t* keys;
  uint8_t* values;
  bool bf16;
  int D;
};

// Attention of a block of rows, all heads of one key-value group, over the cache slots of one split.
struct AttentionBlock {
  HeadCache cache;
  const float* queries;  // [rows][row_stride], heads D apart
  int64_t row_stride;
  int rows;
  int heads;             // of the group
  int64_t first, last;   // slots, `first` a multiple of 16
  int64_t tail;          // slots from here on are looked up in `visible`
  const uint16_t* visible;  // [rows][visible_stride]: bit i of word j is slot `tail` + 16 j + i
  int64_t visible_stride;
  const int64_t* oldest;    // [rows] the first visible slot before `tail` (sliding windows)
  float scale;
  float softcap;            // 0: none
  float* out;               // unnormalised sums; row r, head h at r * out_row_stride + h * D'
  float* largest;           // row r, head h at r * statistics_row_stride + h
  float* total;             // likewise; 0 where the row sees none of these slots
  int64_t out_row_stride;
  int64_t statistics_row_stride;
  float* scratch;           // attention_scratch() floats
};

// Slots per split of the cache. Fixed, so that a row's sums run in the same order whatever the shape of the step.
constexpr int64_t kSplit = 512;
constexpr int kMostQueries = 64;
constexpr int kMostHeadDimension = 512;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t attention_scratch(int D) { return kMostQueries * (kSplit + round_up(D, 16) + 64); }

struct VectorKernels {
  Kernel f32;
  Kernel bf16;
  Kernel bf16_tiles;
  Kernel bf16_tiles_dot;  // by pair dot products; null where there are none

  void (*round_bf16)(const float* x, int64_t n, uint16_t* out);
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float epsilon, float* out);
  void (*add)(float* x, const float* y, int64_t n);
  void (*scale)(float* x, float factor, int64_t n);
  void (*gate)(Activation activation, const float* gate, const float* up, int64_t n, float* out);
  void (*soft_cap)(float* x, int64_t n, float cap);
  void (*attend)(const AttentionBlock& block);
  // out[D] = the splits' sums put together; sums `sum_stride`, statistics `statistics_stride` floats apart.
  void (*merge)(const float* sums, int64_t sum_stride, const float* largest, const float* total,
                int64_t statistics_stride, int splits, int D, float* out);
  void (*find_best)(const float* logits, int64_t n, int32_t first_token, Best* best);
  void (*top_k)(const float* logits, int64_t n, int k, int32_t* tokens);
  float (*read_all)(const float* x, int64_t n);  // their sum, as fast as memory gives them (n / 64 * 64 of them)
};

namespace portable {
const VectorKernels& kernels();
}
#if defined(__x86_64__) || defined(_M_X64)
namespace avx2 {
const VectorKernels& kernels();
}
namespace avx512 {
const VectorKernels& kernels();
}
namespace avx512_bf16 {
const VectorKernels& kernels();
}
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
namespace neon {
const VectorKernels& kernels();
}
#endif

const VectorKernels& vector_kernels(InstructionSet isa);

// Instruction sets that were compiled in and that this machine runs, best last.
const InstructionSet* available_instruction_sets(int* count);
InstructionSet best_instruction_set();

}  // namespace shoestring
