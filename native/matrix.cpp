// Which kernel runs a matrix: dense types here, quantised ones in quantized.hpp.
#include "matrix.hpp"

#include <chrono>
#include <cstring>
#include <vector>

#include "cpu_features.hpp"
#include "kernels.hpp"
#include "quantized.hpp"

namespace shoestring {
namespace {

[[maybe_unused]] bool has_feature(const std::vector<std::string>& features, const char* name) {
  for (const std::string& feature : features) {
    if (feature == name) return true;
  }
  return false;
}

std::vector<InstructionSet> find_instruction_sets() {
  std::vector<InstructionSet> sets = {InstructionSet::portable};
  const std::vector<std::string> features = cpu_features();
#if defined(SHOESTRING_X86_KERNELS)
  if (has_feature(features, "avx2") && has_feature(features, "fma")) {
    sets.push_back(InstructionSet::avx2);
    if (has_feature(features, "avx512f") && has_feature(features, "avx512bw") && has_feature(features, "avx512vl") &&
        has_feature(features, "avx512dq")) {
      sets.push_back(InstructionSet::avx512);
      if (has_feature(features, "avx512_bf16") && has_feature(features, "avx512_vnni")) {
        sets.push_back(InstructionSet::avx512_bf16_vnni);
      }
    }
  }
#endif
#if defined(SHOESTRING_NEON_KERNELS)
  if (has_feature(features, "neon")) sets.push_back(InstructionSet::neon);
#endif
  return sets;
}

// Seconds of the best of a few products of sixteen rows with a small matrix.
double time_kernel(const Kernel& kernel) {
  constexpr int kRows = 16, kOutputs = 48, kCols = 256;
  std::vector<uint8_t> weights(kOutputs * kCols * 2), x(kRows * kCols * 4);
  std::vector<float> y(kRows * kOutputs);
  const Matrix w{WeightType::bf16_tiles, kOutputs, kCols, weights.data()};
  double best = 1;
  for (int i = 0; i < 20; ++i) {
    const auto began = std::chrono::steady_clock::now();
    kernel.multiply(w, x.data(), kCols * 4, kRows, 0, kOutputs, y.data(), kOutputs);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    if (seconds.count() < best) best = seconds.count();
  }
  return best;
}

// Intel's processors without AMX multiply bfloat16 pairs at half the rate of floats, AMD's at twice that rate: measured.
bool pair_dots_are_fast(const VectorKernels& kernels) {
  static const bool fast = time_kernel(kernels.bf16_tiles_dot) < 0.8 * time_kernel(kernels.bf16_tiles);
  return fast;
}

const Kernel* find_dense_kernel(WeightType type, InstructionSet isa) {
  const VectorKernels& kernels = vector_kernels(isa);
  switch (type) {
    case WeightType::f32:
      return &kernels.f32;
    case WeightType::bf16:
      return &kernels.bf16;
    case WeightType::bf16_tiles:
      if (kernels.bf16_tiles_dot.multiply != nullptr && pair_dots_are_fast(kernels)) return &kernels.bf16_tiles_dot;
      return &kernels.bf16_tiles;
    default:
      return nullptr;
  }
}

float widen_bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

const VectorKernels& vector_kernels(InstructionSet isa) {
  switch (isa) {
#if defined(SHOESTRING_X86_KERNELS)
    case InstructionSet::avx2:
      return avx2::kernels();
    case InstructionSet::avx512:
      return avx512::kernels();
    case InstructionSet::avx512_bf16_vnni:
      return avx512_bf16::kernels();
#endif
#if defined(SHOESTRING_NEON_KERNELS)
    case InstructionSet::neon:
      return neon::kernels();
#endif
    default:
      return portable::kernels();
  }
}

const InstructionSet* available_instruction_sets(int* count) {
  static const std::vector<InstructionSet> sets = find_instruction_sets();
  *count = static_cast<int>(sets.size());
  return sets.data();
}

InstructionSet best_instruction_set() {
  int count;
  const InstructionSet* sets = available_instruction_sets(&count);
  return sets[count - 1];
}

const Kernel* find_kernel(WeightType type, InstructionSet isa) {
  const Kernel* kernel = find_dense_kernel(type, isa);
  return kernel != nullptr ? kernel : find_quantized_kernel(type, isa);
}

size_t prepared_bytes(ActivationFormat format, int64_t cols) {
  // Whole vectors, the last filled up with zeros.
  switch (format) {
    case ActivationFormat::f32:
      return static_cast<size_t>(round_up(cols, 16)) * sizeof(float);
    case ActivationFormat::bf16:
      return static_cast<size_t>(round_up(cols, 32)) * sizeof(uint16_t);
    default:
      return int8_blocks_bytes(cols);
  }
}

void prepare_row(ActivationFormat format, InstructionSet isa, const float* x, int64_t cols, uint8_t* out) {
  switch (format) {
    case ActivationFormat::f32:
      std::memcpy(out, x, static_cast<size_t>(cols) * sizeof(float));
      std::memset(out + cols * sizeof(float), 0, prepared_bytes(format, cols) - cols * sizeof(float));
      return;
    case ActivationFormat::bf16:
      vector_kernels(isa).round_bf16(x, cols, reinterpret_cast<uint16_t*>(out));
      std::memset(out + cols * sizeof(uint16_t), 0, prepared_bytes(format, cols) - cols * sizeof(uint16_t));
      return;
    default:
      prepare_int8_blocks(isa, x, cols, out);
  }
}

void dequantize_row(const Matrix& w, int64_t row, float* out) {
  switch (w.type) {
    case WeightType::f32:
      std::memcpy(out, w.data + row * w.cols * 4, static_cast<size_t>(w.cols) * 4);
      return;
    case WeightType::bf16:
      for (int64_t c = 0; c < w.cols; ++c) out[c] = widen_bf16(w.data + (row * w.cols + c) * 2);
      return;
    case WeightType::bf16_tiles: {
      const uint8_t* tile = w.data + row / 16 * ((w.cols + 1) / 2 * 64) + row % 16 * 4;
      for (int64_t c = 0; c < w.cols; ++c) out[c] = widen_bf16(tile + c / 2 * 64 + c % 2 * 2);
      return;
    }
    default:
      dequantize_quantized_row(w, row, out);
  }
}

int64_t matrix_bytes(WeightType type, int64_t rows, int64_t cols) {
  switch (type) {
    case WeightType::f32:
      return rows * cols * 4;
    case WeightType::bf16:
      return rows * cols * 2;
    case WeightType::bf16_tiles:
      return round_up(rows, 16) / 16 * ((cols + 1) / 2 * 64);
    default:
      return quantized_matrix_bytes(type, rows, cols);
  }
}

}  // namespace shoestring
