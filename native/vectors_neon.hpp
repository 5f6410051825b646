// Sixteen floats at a time, as four quarters, on 64-bit ARM. Included only by translation units compiled for it.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace shoestring {
namespace SHOESTRING_ISA {

struct F16 {
  float32x4_t part[4];
};

constexpr int kAccumulators = 6;
constexpr int kMostRows = 6;
constexpr int kUsualRows = 6;
constexpr int kMostTiles = 2;
constexpr bool kHasPairDot = false;

#define SHOESTRING_PARTS(expression)                        \
  F16 result;                                               \
  for (int i = 0; i < 4; ++i) result.part[i] = expression;  \
  return result
inline F16 zero() { SHOESTRING_PARTS(vdupq_n_f32(0)); }
inline F16 broadcast(float x) { SHOESTRING_PARTS(vdupq_n_f32(x)); }
inline F16 load(const float* p) { SHOESTRING_PARTS(vld1q_f32(p + 4 * i)); }
inline void store(float* p, F16 x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.part[i]);
}
inline F16 add(F16 a, F16 b) { SHOESTRING_PARTS(vaddq_f32(a.part[i], b.part[i])); }
inline F16 sub(F16 a, F16 b) { SHOESTRING_PARTS(vsubq_f32(a.part[i], b.part[i])); }
inline F16 mul(F16 a, F16 b) { SHOESTRING_PARTS(vmulq_f32(a.part[i], b.part[i])); }
inline F16 div(F16 a, F16 b) { SHOESTRING_PARTS(vdivq_f32(a.part[i], b.part[i])); }
inline F16 min(F16 a, F16 b) { SHOESTRING_PARTS(vminq_f32(a.part[i], b.part[i])); }
inline F16 max(F16 a, F16 b) { SHOESTRING_PARTS(vmaxq_f32(a.part[i], b.part[i])); }
inline F16 fma(F16 a, F16 b, F16 c) { SHOESTRING_PARTS(vfmaq_f32(c.part[i], a.part[i], b.part[i])); }
inline F16 fnma(F16 a, F16 b, F16 c) { SHOESTRING_PARTS(vfmsq_f32(c.part[i], a.part[i], b.part[i])); }
inline float sum(F16 x) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(x.part[0], x.part[1]), vaddq_f32(x.part[2], x.part[3])));
}
inline float largest(F16 x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.part[0], x.part[1]), vmaxq_f32(x.part[2], x.part[3])));
}
inline F16 round(F16 x) { SHOESTRING_PARTS(vrndnq_f32(x.part[i])); }
inline float32x4_t power_of_two(float32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
// x * 2^n for whole n within [-126, 127].
inline F16 scale_by_power(F16 x, F16 n) { SHOESTRING_PARTS(vmulq_f32(x.part[i], power_of_two(n.part[i]))); }
// Lane i of `a` where bit i of the mask is set, else of `b`.
inline F16 select(uint32_t mask, F16 a, F16 b) {
  static const uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(kBits);
  SHOESTRING_PARTS(vbslq_f32(vtstq_u32(vdupq_n_u32(mask >> (4 * i)), bits), a.part[i], b.part[i]));
}
inline uint32_t mask_of(const uint32x4_t (&lanes)[4]) {
  static const uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(kBits);
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= vaddvq_u32(vandq_u32(lanes[i], bits)) << (4 * i);
  return mask;
}
inline uint32_t greater(F16 a, F16 b) {
  uint32x4_t lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = vcgtq_f32(a.part[i], b.part[i]);
  return mask_of(lanes);
}
inline uint32_t not_a_number(F16 a) {
  uint32x4_t lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = vmvnq_u32(vceqq_f32(a.part[i], a.part[i]));
  return mask_of(lanes);
}

inline uint16x4_t load_halves(const uint8_t* p) { return vreinterpret_u16_u8(vld1_u8(p)); }
inline uint32x4_t load_words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
inline F16 load_bf16(const uint8_t* p) {
  SHOESTRING_PARTS(vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(load_halves(p + 8 * i)), 16)));
}
inline F16 low_halves(const uint8_t* p) {
  SHOESTRING_PARTS(vreinterpretq_f32_u32(vshlq_n_u32(load_words(p + 16 * i), 16)));
}
inline F16 high_halves(const uint8_t* p) {
  SHOESTRING_PARTS(vreinterpretq_f32_u32(vandq_u32(load_words(p + 16 * i), vdupq_n_u32(0xFFFF0000u))));
}
#undef SHOESTRING_PARTS

// Sums of sixteen floats in double precision: the order of the terms then hardly matters.
struct WideSum {
  float64x2_t low = vdupq_n_f64(0), high = vdupq_n_f64(0);
  void add(F16 x) {
    for (int i = 0; i < 4; ++i) {
      low = vaddq_f64(low, vcvt_f64_f32(vget_low_f32(x.part[i])));
      high = vaddq_f64(high, vcvt_high_f64_f32(x.part[i]));
    }
  }
  double total() const { return vaddvq_f64(vaddq_f64(low, high)); }
};

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
inline void prefetch_far(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace SHOESTRING_ISA
}  // namespace shoestring
