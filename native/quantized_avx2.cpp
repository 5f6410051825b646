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

__m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
__m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
__m256i bits(__m256i bytes, char mask) { return _mm256_and_si256(bytes, _mm256_set1_epi8(mask)); }

void store(WeightBlock* out, __m256i q, float d, float m) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out->q), q);
  set_scale(out, d, m);
}

// Low nibbles, then high ones.
__m256i nibbles(__m128i pairs) {
  return bits(_mm256_inserti128_si256(_mm256_castsi128_si256(pairs), _mm_srli_epi16(pairs, 4), 1), 15);
}

// The same formats as quantized_formats.hpp, in vectors.
struct Avx2Decoder {
  static void decode(Q8_0, const uint8_t* p, int, WeightBlock* out) { store(out, load32(p + 2), load_half(p), 0); }

  static void decode(Q4_0, const uint8_t* p, int, WeightBlock* out) {
    store(out, _mm256_sub_epi8(nibbles(load16(p + 2)), _mm256_set1_epi8(8)), load_half(p), 0);
  }

  static void decode(Q4_1, const uint8_t* p, int, WeightBlock* out) {
    store(out, nibbles(load16(p + 4)), load_half(p), load_half(p + 2));
  }

  static void decode(Q5_0, const uint8_t* p, int, WeightBlock* out) {
    const __m256i q = _mm256_or_si256(nibbles(load16(p + 6)), fifth_bits(p + 2));
    store(out, _mm256_sub_epi8(q, _mm256_set1_epi8(16)), load_half(p), 0);
  }

  static void decode(Q5_1, const uint8_t* p, int, WeightBlock* out) {
    store(out, _mm256_or_si256(nibbles(load16(p + 8)), fifth_bits(p + 4)), load_half(p), load_half(p + 2));
  }

  static void decode(Q4_K, const uint8_t* p, int, WeightBlock* out) {
    const float d = load_half(p), dmin = load_half(p + 2);
    for (int j = 0; j < 8; ++j) {
      const __m256i pairs = load32(p + 16 + 32 * (j / 2));
      store_k(out + j, bits(j % 2 ? _mm256_srli_epi16(pairs, 4) : pairs, 15), p + 4, j, d, dmin);
    }
  }

  static void decode(Q5_K, const uint8_t* p, int, WeightBlock* out) {
    const float d = load_half(p), dmin = load_half(p + 2);
    const __m256i upper = load32(p + 16);
    for (int j = 0; j < 8; ++j) {
      const __m256i pairs = load32(p + 48 + 32 * (j / 2));
      const __m256i fifth = _mm256_slli_epi16(bits(_mm256_srl_epi16(upper, _mm_cvtsi32_si128(j)), 1), 4);
      const __m256i q = _mm256_or_si256(bits(j % 2 ? _mm256_srli_epi16(pairs, 4) : pairs, 15), fifth);
      store_k(out + j, q, p + 4, j, d, dmin);
    }
  }

  static void decode(Q6_K, const uint8_t* p, int, WeightBlock* out) {
    const float d = load_half(p + 208);
    for (int j = 0; j < 8; ++j) {
      const __m256i pairs = load32(p + 64 * (j / 4) + 32 * (j % 2));
      const __m256i lower = bits(j / 2 % 2 ? _mm256_srli_epi16(pairs, 4) : pairs, 15);
      const __m256i upper = _mm256_srl_epi16(load32(p + 128 + 32 * (j / 4)), _mm_cvtsi32_si128(2 * (j % 4)));
      const __m256i q = _mm256_or_si256(lower, _mm256_slli_epi16(bits(upper, 3), 4));
      store(out + j, _mm256_sub_epi8(q, _mm256_set1_epi8(32)), 0, 0);
      for (int half = 0; half < 2; ++half) {
        out[j].d[half] = d * static_cast<float>(static_cast<int8_t>(p[192 + 2 * j + half]));
      }
    }
  }

  static void decode(Int8Tiles, const uint8_t* p, int row, WeightBlock* out) {
    const __m256i offsets = _mm256_setr_epi32(0, 64, 128, 192, 256, 320, 384, 448);
    const __m256i q = _mm256_i32gather_epi32(reinterpret_cast<const int*>(p + 4 * row), offsets, 1);
    store(out, _mm256_xor_si256(q, _mm256_set1_epi8(-128)), load_half(p + 512 + 2 * row), 0);
  }

  static void decode(Int4Tiles, const uint8_t* p, int row, WeightBlock* out) {
    const __m128i offsets = _mm_setr_epi32(0, 64, 128, 192);
    const __m128i pairs = _mm_i32gather_epi32(reinterpret_cast<const int*>(p + 4 * row), offsets, 1);
    store(out, nibbles(pairs), load_half(p + 256 + 2 * row), load_half(p + 288 + 2 * row));
  }

 private:
  // Bit i of the word at `p`, as 16 in byte i.
  static __m256i fifth_bits(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i place = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), bytes), place);
    return bits(_mm256_cmpeq_epi8(spread, place), 16);
  }

  static void store_k(WeightBlock* out, __m256i q, const uint8_t* packed, int j, float d, float dmin) {
    int scale, minimum;
    k_scale_min(packed, j, &scale, &minimum);
    store(out, q, d * static_cast<float>(scale), -(dmin * static_cast<float>(minimum)));
  }
};

struct Avx2 : Avx2Decoder {
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
