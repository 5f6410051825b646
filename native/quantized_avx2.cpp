// AVX2 (with FMA and F16C) kernels of the quantised types.
#include <immintrin.h>

#include "quantized_rows.hpp"

namespace shoestring {
namespace quantized {
namespace {

float horizontal_sum(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

struct Avx2 {
  using Sum = __m256;
  static Sum zero() { return _mm256_setzero_ps(); }
  static float total(Sum sum) { return horizontal_sum(sum); }

  template <bool kHalves>
  static Sum multiply_add(Sum sum, const WeightBlock& w, const ActivationBlock& x) {
    const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.q));
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.values));
    // |w| * (x with w's sign): the only 8-bit product here is unsigned times signed. 2 * 128 * 127 fits 16 bits.
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(values, weights));
    const __m256 dots = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    __m256 scale = _mm256_set1_ps(w.d[0] * x.scale);
    if (kHalves) scale = _mm256_insertf128_ps(scale, _mm_set1_ps(w.d[1] * x.scale), 1);
    return _mm256_fmadd_ps(dots, scale, sum);
  }
};

// f16 weights: R rows by N activation rows in registers.
template <int R, int N>
void multiply_f16(const Matrix& w, const float* const* x, int64_t row, float* y, int64_t y_stride) {
  const uint8_t* weights = w.data + 2 * row * w.cols;
  __m256 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm256_setzero_ps();
  }
  int64_t col = 0;
  for (; col + 8 <= w.cols; col += 8) {
    __m256 wr[R];
    for (int r = 0; r < R; ++r) {
      wr[r] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 2 * (r * w.cols + col))));
    }
    for (int n = 0; n < N; ++n) {
      const __m256 xn = _mm256_loadu_ps(x[n] + col);
      for (int r = 0; r < R; ++r) sums[r][n] = _mm256_fmadd_ps(wr[r], xn, sums[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      float sum = horizontal_sum(sums[r][n]);
      for (int64_t i = col; i < w.cols; ++i) sum += load_half(weights + 2 * (r * w.cols + i)) * x[n][i];
      y[n * y_stride + row + r] = sum;
    }
  }
}

template <int N>
void multiply_f16_rows(const Matrix& w, const uint8_t* x, size_t x_stride, int64_t first, int64_t last, float* y,
                       int64_t y_stride) {
  const float* rows[N];
  for (int n = 0; n < N; ++n) rows[n] = reinterpret_cast<const float*>(x + n * x_stride);
  int64_t row = first;
  for (; row + 2 <= last; row += 2) multiply_f16<2, N>(w, rows, row, y, y_stride);
  for (; row < last; ++row) multiply_f16<1, N>(w, rows, row, y, y_stride);
}

void multiply_f16_any(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
                      int64_t y_stride) {
  int t = 0;
  for (; t + 4 <= T; t += 4) {
    multiply_f16_rows<4>(w, x + t * x_stride, x_stride, first, last, y + t * y_stride, y_stride);
  }
  for (; t < T; ++t) multiply_f16_rows<1>(w, x + t * x_stride, x_stride, first, last, y + t * y_stride, y_stride);
}

}  // namespace

const Kernel* avx2_kernel(WeightType type) {
  static const Kernel f16{ActivationFormat::f32, multiply_f16_any, 1};
  return type == WeightType::f16 ? &f16 : find_row_kernel<Avx2>(type);
}

}  // namespace quantized
}  // namespace shoestring
