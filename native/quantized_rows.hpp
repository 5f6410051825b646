// The product for short vectors: a few weight rows decoded to int8 in the first-level cache, then used for every
// activation row. `Vectors` supplies an instruction set:
//   Sum                                           an accumulator, of partial sums in fp32
//   static Sum zero()
//   static Sum multiply_add<kHalves>(Sum, const WeightBlock&, const ActivationBlock&)   without the minimum
//   static float total(Sum)
//   static void decode(Format, const uint8_t* p, int lane, WeightBlock* out)   as Format::decode, faster
#pragma once

#include "quantized_formats.hpp"

namespace shoestring {
namespace quantized {
namespace {

constexpr int kChunkBlocks = 32;  // 1024 columns: four decoded rows take 6 KiB

template <class Vectors, class Format, int R>
inline void multiply_rows(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t row, float* y,
                          int64_t y_stride) {
  constexpr int kBlocks = Format::kCols / kBlockCols;  // of 32, in one of the format's
  WeightBlock weights[R][kChunkBlocks];
  const int64_t blocks = w.cols / kBlockCols;
  if (blocks == 0) {
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) y[t * y_stride + row + r] = 0;
    }
  }
  for (int64_t begin = 0; begin < blocks; begin += kChunkBlocks) {
    const int count = static_cast<int>(blocks - begin < kChunkBlocks ? blocks - begin : kChunkBlocks);
    for (int r = 0; r < R; ++r) {
      const uint8_t* p = row_start<Format>(w, row + r) + begin / kBlocks * Format::kBytes;
      const int lane = static_cast<int>((row + r) % Format::kRows);
      for (int b = 0; b < count; b += kBlocks, p += Format::kBytes) Vectors::decode(Format{}, p, lane, &weights[r][b]);
    }
    for (int t = 0; t < T; ++t) {
      const auto* xt = reinterpret_cast<const ActivationBlock*>(x + t * x_stride) + begin;
      typename Vectors::Sum sums[R];
      float minima[R] = {};
      for (int r = 0; r < R; ++r) sums[r] = Vectors::zero();
      for (int b = 0; b < count; ++b) {
        for (int r = 0; r < R; ++r) {
          sums[r] = Vectors::template multiply_add<Format::kHalves>(sums[r], weights[r][b], xt[b]);
          if (Format::kMinimum) minima[r] += weights[r][b].m * xt[b].sum;
        }
      }
      for (int r = 0; r < R; ++r) {
        float* out = &y[t * y_stride + row + r];
        const float chunk = Vectors::total(sums[r]) + minima[r];
        *out = begin ? *out + chunk : chunk;
      }
    }
  }
}

template <class Vectors, class Format>
void multiply(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) multiply_rows<Vectors, Format, 4>(w, x, x_stride, T, row, y, y_stride);
  for (; row < last; ++row) multiply_rows<Vectors, Format, 1>(w, x, x_stride, T, row, y, y_stride);
}

template <class Vectors>
const Kernel* find_row_kernel(WeightType type) {
  const Kernel* found = nullptr;
  with_format(type, [&](auto format) {
    static const Kernel kernel{ActivationFormat::int8_blocks, multiply<Vectors, decltype(format)>, 1};
    found = &kernel;
  });
  return found;
}

}  // namespace
}  // namespace quantized
}  // namespace shoestring
