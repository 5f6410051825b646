// Kernels for any processor: a chunk of a weight row as fp32, then plain dot products with f32 activations.
#include "quantized_formats.hpp"

namespace shoestring {
namespace quantized {
namespace {

constexpr int kChunk = 256;  // columns decoded at once

struct F16 {};

float dot(const float* a, const float* b, int n) {
  float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};  // independent, for the vectoriser
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class Format>
void decode_chunk(const Matrix& w, int64_t row, int64_t col, int count, float* out) {
  const uint8_t* p = row_start<Format>(w, row) + col / Format::kCols * Format::kBytes;
  WeightBlock blocks[Format::kCols / kBlockCols];
  for (int done = 0; done < count; done += Format::kCols, p += Format::kBytes) {
    Format::decode(p, static_cast<int>(row % Format::kRows), blocks);
    for (const WeightBlock& block : blocks) {
      for (int i = 0; i < kBlockCols; ++i) *out++ = block.d[i / 16] * static_cast<float>(block.q[i]) + block.m;
    }
  }
}

template <>
void decode_chunk<F16>(const Matrix& w, int64_t row, int64_t col, int count, float* out) {
  const uint8_t* p = w.data + 2 * (row * w.cols + col);
  for (int i = 0; i < count; ++i) out[i] = load_half(p + 2 * i);
}

template <class Format>
void multiply(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  float weights[kChunk];
  for (int64_t row = first; row < last; ++row) {
    for (int t = 0; t < T; ++t) y[t * y_stride + row] = 0;
    for (int64_t col = 0; col < w.cols; col += kChunk) {
      const int count = static_cast<int>(w.cols - col < kChunk ? w.cols - col : kChunk);
      decode_chunk<Format>(w, row, col, count, weights);
      for (int t = 0; t < T; ++t) {
        const float* xt = reinterpret_cast<const float*>(x + t * x_stride) + col;
        y[t * y_stride + row] += dot(weights, xt, count);
      }
    }
  }
}

template <class Format>
const Kernel* kernel() {
  static const Kernel found{ActivationFormat::f32, multiply<Format>, 1};
  return &found;
}

}  // namespace

const Kernel* portable_kernel(WeightType type) {
  if (type == WeightType::f16) return kernel<F16>();
  const Kernel* found = nullptr;
  with_format(type, [&](auto format) { found = kernel<decltype(format)>(); });
  return found;
}

}  // namespace quantized
}  // namespace shoestring
