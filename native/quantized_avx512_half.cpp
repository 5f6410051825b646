// AVX-512: f16 weights with f32 activations, four weight rows by up to six activation rows in registers.
#include "quantized_avx512.hpp"

namespace shoestring {
namespace quantized {
namespace {

constexpr int kHalfRows = 6;

template <int R, int N>
void multiply_rows(const uint8_t* w, int64_t cols, const uint8_t* x, size_t x_stride, float* y, int64_t y_stride) {
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm512_setzero_ps();
  }
  for (int64_t col = 0; col < cols; col += 16) {
    const __mmask16 mask = cols - col >= 16 ? 0xffff : static_cast<__mmask16>((1u << (cols - col)) - 1);
    __m512 weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      weights[r] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w + 2 * (r * cols + col)));
    }
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      const __m512 xn = _mm512_maskz_loadu_ps(mask, reinterpret_cast<const float*>(x + n * x_stride) + col);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][n] = _mm512_fmadd_ps(weights[r], xn, sums[r][n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) y[n * y_stride + r] = _mm512_reduce_add_ps(sums[r][n]);
  }
}

template <int R>
void multiply_any(const uint8_t* w, int64_t cols, const uint8_t* x, size_t x_stride, int T, float* y,
                  int64_t y_stride) {
  using Multiply = void (*)(const uint8_t*, int64_t, const uint8_t*, size_t, float*, int64_t);
  static constexpr Multiply kMultiply[kHalfRows] = {multiply_rows<R, 1>, multiply_rows<R, 2>, multiply_rows<R, 3>,
                                                    multiply_rows<R, 4>, multiply_rows<R, 5>, multiply_rows<R, 6>};
  for (int t = 0; t < T; t += kHalfRows) {
    const int n = T - t < kHalfRows ? T - t : kHalfRows;
    kMultiply[n - 1](w, cols, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
  }
}

void multiply(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) {
    multiply_any<4>(w.data + 2 * row * w.cols, w.cols, x, x_stride, T, y + row, y_stride);
  }
  for (; row < last; ++row) {
    multiply_any<1>(w.data + 2 * row * w.cols, w.cols, x, x_stride, T, y + row, y_stride);
  }
}

}  // namespace

const Kernel* avx512_half_kernel() {
  static const Kernel kernel{ActivationFormat::f32, multiply, 1};
  return &kernel;
}

}  // namespace quantized
}  // namespace shoestring
