// Sixteen floats at a time in plain C++: the twin that every other instruction set is held against.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace shoestring {
namespace SHOESTRING_ISA {

struct F16 {
  float lane[16];
};

constexpr int kAccumulators = 4;
constexpr int kMostRows = 4;
constexpr int kUsualRows = 4;
constexpr int kMostTiles = 1;
constexpr bool kHasPairDot = false;

#define SHOESTRING_LANES(expression)                  \
  F16 result;                                         \
  for (int i = 0; i < 16; ++i) result.lane[i] = expression; \
  return result
static inline F16 zero() { SHOESTRING_LANES(0.0f); }
static inline F16 broadcast(float x) { SHOESTRING_LANES(x); }
static inline F16 load(const float* p) {
  F16 result;
  std::memcpy(result.lane, p, sizeof result.lane);
  return result;
}
static inline void store(float* p, F16 x) { std::memcpy(p, x.lane, sizeof x.lane); }
static inline F16 add(F16 a, F16 b) { SHOESTRING_LANES(a.lane[i] + b.lane[i]); }
static inline F16 sub(F16 a, F16 b) { SHOESTRING_LANES(a.lane[i] - b.lane[i]); }
static inline F16 mul(F16 a, F16 b) { SHOESTRING_LANES(a.lane[i] * b.lane[i]); }
static inline F16 div(F16 a, F16 b) { SHOESTRING_LANES(a.lane[i] / b.lane[i]); }
static inline F16 min(F16 a, F16 b) { SHOESTRING_LANES(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
static inline F16 max(F16 a, F16 b) { SHOESTRING_LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
static inline F16 fma(F16 a, F16 b, F16 c) { SHOESTRING_LANES(a.lane[i] * b.lane[i] + c.lane[i]); }
static inline F16 fnma(F16 a, F16 b, F16 c) { SHOESTRING_LANES(c.lane[i] - a.lane[i] * b.lane[i]); }
static inline float sum(F16 x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.lane[i] += x.lane[i + width];
  }
  return x.lane[0];
}
static inline float largest(F16 x) {
  float result = x.lane[0];
  for (int i = 1; i < 16; ++i) result = x.lane[i] > result ? x.lane[i] : result;
  return result;
}
static inline F16 round(F16 x) { SHOESTRING_LANES(::nearbyintf(x.lane[i])); }
// x * 2^n for whole n.
static inline F16 scale_by_power(F16 x, F16 n) { SHOESTRING_LANES(::ldexpf(x.lane[i], static_cast<int>(n.lane[i]))); }
// Lane i of `a` where bit i of the mask is set, else of `b`.
static inline F16 select(uint32_t mask, F16 a, F16 b) { SHOESTRING_LANES(mask >> i & 1 ? a.lane[i] : b.lane[i]); }
static inline uint32_t greater(F16 a, F16 b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a.lane[i] > b.lane[i]) << i;
  return mask;
}
static inline uint32_t not_a_number(F16 a) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a.lane[i] != a.lane[i]) << i;
  return mask;
}

static inline F16 widen(const uint8_t* p, int step, int offset) {
  F16 result;
  for (int i = 0; i < 16; ++i) {
    uint16_t half;
    std::memcpy(&half, p + i * step + offset, sizeof half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&result.lane[i], &bits, sizeof bits);
  }
  return result;
}
static inline F16 load_bf16(const uint8_t* p) { return widen(p, 2, 0); }
static inline F16 low_halves(const uint8_t* p) { return widen(p, 4, 0); }
static inline F16 high_halves(const uint8_t* p) { return widen(p, 4, 2); }
#undef SHOESTRING_LANES

// Sums of sixteen floats in double precision: the order of the terms then hardly matters.
struct WideSum {
  double value = 0;
  void add(F16 x) {
    for (int i = 0; i < 16; ++i) value += x.lane[i];
  }
  double total() const { return value; }
};

static inline void prefetch(const uint8_t*) {}
static inline void prefetch_far(const uint8_t*) {}

}  // namespace SHOESTRING_ISA
}  // namespace shoestring
