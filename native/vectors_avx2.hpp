// Sixteen floats at a time, as two halves, on AVX2 with FMA. Included only by translation units compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace shoestring {
namespace SHOESTRING_ISA {

struct F16 {
  __m256 low, high;
};

// Twelve of the sixteen registers hold sums.
constexpr int kAccumulators = 6;
constexpr int kMostRows = 6;
constexpr int kUsualRows = 6;
constexpr int kMostTiles = 2;
constexpr bool kHasPairDot = false;

inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
#define SHOESTRING_BINARY(name, intrinsic) \
  inline F16 name(F16 a, F16 b) { return {intrinsic(a.low, b.low), intrinsic(a.high, b.high)}; }
SHOESTRING_BINARY(add, _mm256_add_ps)
SHOESTRING_BINARY(sub, _mm256_sub_ps)
SHOESTRING_BINARY(mul, _mm256_mul_ps)
SHOESTRING_BINARY(div, _mm256_div_ps)
SHOESTRING_BINARY(min, _mm256_min_ps)
SHOESTRING_BINARY(max, _mm256_max_ps)
#undef SHOESTRING_BINARY
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F16 fnma(F16 a, F16 b, F16 c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline float sum(F16 x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float largest(F16 x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline F16 round(F16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}
inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// x * 2^n for whole n within [-126, 127].
inline F16 scale_by_power(F16 x, F16 n) {
  return {_mm256_mul_ps(x.low, power_of_two(n.low)), _mm256_mul_ps(x.high, power_of_two(n.high))};
}
inline __m256 lanes_of(uint32_t mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(
      _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits));
}
// Lane i of `a` where bit i of the mask is set, else of `b`.
inline F16 select(uint32_t mask, F16 a, F16 b) {
  return {_mm256_blendv_ps(b.low, a.low, lanes_of(mask)), _mm256_blendv_ps(b.high, a.high, lanes_of(mask >> 8))};
}
inline uint32_t greater(F16 a, F16 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ)) << 8);
}
inline uint32_t not_a_number(F16 a) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.low, a.low, _CMP_UNORD_Q)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.high, a.high, _CMP_UNORD_Q)) << 8);
}

inline __m256 widen_bf16(const uint8_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline F16 load_bf16(const uint8_t* p) { return {widen_bf16(p), widen_bf16(p + 16)}; }
inline __m256i load_integers(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline F16 low_halves(const uint8_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(load_integers(p), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(load_integers(p + 32), 16))};
}
inline F16 high_halves(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(load_integers(p), mask)),
          _mm256_castsi256_ps(_mm256_and_si256(load_integers(p + 32), mask))};
}

// Sums of sixteen floats in double precision: the order of the terms then hardly matters.
struct WideSum {
  __m256d parts[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
  void add(F16 x) {
    add_half(x.low);
    add_half(x.high);
  }
  void add_half(__m256 half) {
    parts[0] = _mm256_add_pd(parts[0], _mm256_cvtps_pd(_mm256_castps256_ps128(half)));
    parts[1] = _mm256_add_pd(parts[1], _mm256_cvtps_pd(_mm256_extractf128_ps(half, 1)));
  }
  double total() const {
    const __m256d four = _mm256_add_pd(parts[0], parts[1]);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace SHOESTRING_ISA
}  // namespace shoestring
