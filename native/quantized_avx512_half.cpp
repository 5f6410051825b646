// AVX-512: f16 weights with f32 activations: sixteen weight rows as lanes, a chunk of them widened and transposed in the
// first-level cache. Narrow matrices and odd widths: four weight rows at once, along the inputs.
//
// The shape of the matrix decides which, never the number of activation rows: a row's result is the same in every step.
#include "quantized_avx512.hpp"

namespace shoestring {
namespace quantized {
namespace {

constexpr int kFewRows = 6;
constexpr int kManyRows = 12;
constexpr int kChunkCols = 256;  // sixteen rows of them take 16 KiB as fp32

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
  static constexpr Multiply kMultiply[kFewRows] = {multiply_rows<R, 1>, multiply_rows<R, 2>, multiply_rows<R, 3>,
                                                   multiply_rows<R, 4>, multiply_rows<R, 5>, multiply_rows<R, 6>};
  for (int t = 0; t < T; t += kFewRows) {
    const int n = T - t < kFewRows ? T - t : kFewRows;
    kMultiply[n - 1](w, cols, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
  }
}

// N activation rows times a chunk: weights[col][16 rows] in fp32, `count` a multiple of 8.
template <int N>
void multiply_chunk(const float* weights, int count, const uint8_t* x, size_t x_stride, float* y, int64_t y_stride,
                    __mmask16 rows, bool add) {
  __m512 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm512_setzero_ps();
  for (int col = 0; col < count; col += 8, weights += 8 * kTileRows, x += 8 * sizeof(float)) {
    __m512 columns[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) columns[k] = _mm512_load_ps(weights + kTileRows * k);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      const float* xn = reinterpret_cast<const float*>(x + n * x_stride);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) sums[n] = _mm512_fmadd_ps(columns[k], _mm512_set1_ps(xn[k]), sums[n]);
    }
  }
  for (int n = 0; n < N; ++n) store_sums(y + n * y_stride, rows, sums[n], add);
}

void multiply_many(RowBytes rows, int64_t cols, const uint8_t* x, size_t x_stride, int T, float* y, int64_t y_stride,
                   __mmask16 mask) {
  alignas(64) float decoded[kChunkCols * kTileRows];
  const uint8_t* next = rows.p + kTileRows * rows.stride;
  for (int64_t begin = 0; begin < cols; begin += kChunkCols, x += kChunkCols * sizeof(float)) {
    const int count = static_cast<int>(cols - begin < kChunkCols ? cols - begin : kChunkCols);
    for (int col = 0; col < count; col += 8, rows = rows + 16) {
      Ahead{next, 16 * kTileRows}.fetch();
      next += 16 * kTileRows;
      __m512i pairs[4];
      rows.transpose16(pairs);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        _mm512_store_ps(decoded + kTileRows * (col + 2 * k), low_halves(pairs[k]));
        _mm512_store_ps(decoded + kTileRows * (col + 2 * k + 1), high_halves(pairs[k]));
      }
    }
    int t = 0;
    for (; t + kManyRows <= T; t += kManyRows) {
      multiply_chunk<kManyRows>(decoded, count, x + t * x_stride, x_stride, y + t * y_stride, y_stride, mask,
                                begin > 0);
    }
    for (; t + 4 <= T; t += 4) {
      multiply_chunk<4>(decoded, count, x + t * x_stride, x_stride, y + t * y_stride, y_stride, mask, begin > 0);
    }
    for (; t < T; ++t) {
      multiply_chunk<1>(decoded, count, x + t * x_stride, x_stride, y + t * y_stride, y_stride, mask, begin > 0);
    }
  }
}

void multiply(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  int64_t row = first;
  if (w.cols % 8 == 0 && w.rows >= kTileRows) {
    for (; row < last; row += kTileRows) {
      const int64_t start = row < w.rows - kTileRows ? row : w.rows - kTileRows;
      multiply_many({w.data + 2 * start * w.cols, 2 * w.cols}, w.cols, x, x_stride, T, y + start, y_stride,
                    lanes(start, row, last));
    }
    return;
  }
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
