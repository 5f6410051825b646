// Sixteen floats at a time on AVX-512 (F, BW, VL, DQ). Included only by translation units compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace shoestring {
namespace SHOESTRING_ISA {

using F16 = __m512;
using Pairs = __m512i;  // sixteen pairs of bfloat16

// Accumulators that fit the 32 registers: rows of activations by tiles of sixteen outputs.
constexpr int kAccumulators = 24;
constexpr int kMostRows = 20;
constexpr int kUsualRows = 16;
constexpr int kMostTiles = 4;

inline F16 zero() { return _mm512_setzero_ps(); }
inline F16 broadcast(float x) { return _mm512_set1_ps(x); }
inline F16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F16 x) { _mm512_storeu_ps(p, x); }
inline F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
inline F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
inline F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
inline F16 div(F16 a, F16 b) { return _mm512_div_ps(a, b); }
inline F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
inline F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
inline F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F16 fnma(F16 a, F16 b, F16 c) { return _mm512_fnmadd_ps(a, b, c); }
inline float sum(F16 x) { return _mm512_reduce_add_ps(x); }
inline float largest(F16 x) { return _mm512_reduce_max_ps(x); }
inline F16 round(F16 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for whole n.
inline F16 scale_by_power(F16 x, F16 n) { return _mm512_scalef_ps(x, n); }
// Lane i of `a` where bit i of the mask is set, else of `b`.
inline F16 select(uint32_t mask, F16 a, F16 b) { return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), b, a); }
inline uint32_t greater(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline uint32_t not_a_number(F16 a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }

inline F16 load_bf16(const uint8_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline F16 low_halves(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}

inline F16 high_halves(const uint8_t* p) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), mask));
}

// Sums of sixteen floats in double precision: the order of the terms then hardly matters.
struct WideSum {
  __m512d low = _mm512_setzero_pd();
  __m512d high = _mm512_setzero_pd();
  void add(F16 x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

#if defined(__AVX512BF16__)
constexpr bool kHasPairDot = true;
inline Pairs load_pairs(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Pairs broadcast_pair(const uint8_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
inline F16 dot_pairs(F16 sum, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
constexpr bool kHasPairDot = false;
#endif

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace SHOESTRING_ISA
}  // namespace shoestring
