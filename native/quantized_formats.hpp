// The layout of every quantised type, defined once in plain C++. Dequantisation, the portable kernels and the
// row-at-a-time kernels read weights through these; wider kernels decode for themselves and are tested against them.
//
// A format has `kCols` columns of `kRows` output rows in `kBytes` bytes, stored one after another along the inputs:
// GGUF's have one row, our tiles 16 interleaved ones. `kMinimum`: m is not always zero. `kHalves`: the two d differ.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "quantized.hpp"

namespace shoestring {
namespace quantized {
namespace {  // each source has its own copies, compiled with its own flags

inline uint16_t load_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  float result;
  if (magnitude >= 0x7c00) {  // infinity or NaN
    const uint32_t bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    std::memcpy(&result, &bits, 4);
  } else if (magnitude >= 0x400) {
    const uint32_t bits = sign | ((magnitude << 13) + (112u << 23));
    std::memcpy(&result, &bits, 4);
  } else {  // subnormal: a multiple of 2^-24
    result = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    if (sign) result = -result;
  }
  return result;
}

inline float load_half(const uint8_t* p) {
#if defined(__F16C__)
  return _cvtsh_ss(load_u16(p));
#elif defined(__aarch64__) && defined(__ARM_FP16_FORMAT_IEEE)
  __fp16 half;
  std::memcpy(&half, p, 2);
  return static_cast<float>(half);
#else
  return half_to_float(load_u16(p));
#endif
}

// 32 weights of one row: w = d * q + m, with a d for each half.
struct WeightBlock {
  int8_t q[kBlockCols];
  float d[2];
  float m;
};

inline void set_scale(WeightBlock* block, float d, float m) {
  block->d[0] = block->d[1] = d;
  block->m = m;
}

struct Q8_0 {  // d | int8[32]
  static constexpr int kCols = 32, kRows = 1, kBytes = 34;
  static constexpr bool kMinimum = false, kHalves = false;
  static void decode(const uint8_t* p, int, WeightBlock* out) {
    std::memcpy(out->q, p + 2, 32);
    set_scale(out, load_half(p), 0);
  }
};

struct Q4_0 {  // d | nibbles[16]: low ones are weights 0..15, high ones 16..31
  static constexpr int kCols = 32, kRows = 1, kBytes = 18;
  static constexpr bool kMinimum = false, kHalves = false;
  static void decode(const uint8_t* p, int, WeightBlock* out) {
    for (int i = 0; i < 16; ++i) {
      out->q[i] = static_cast<int8_t>((p[2 + i] & 15) - 8);
      out->q[16 + i] = static_cast<int8_t>((p[2 + i] >> 4) - 8);
    }
    set_scale(out, load_half(p), 0);
  }
};

struct Q4_1 {  // d, m | nibbles[16]
  static constexpr int kCols = 32, kRows = 1, kBytes = 20;
  static constexpr bool kMinimum = true, kHalves = false;
  static void decode(const uint8_t* p, int, WeightBlock* out) {
    for (int i = 0; i < 16; ++i) {
      out->q[i] = static_cast<int8_t>(p[4 + i] & 15);
      out->q[16 + i] = static_cast<int8_t>(p[4 + i] >> 4);
    }
    set_scale(out, load_half(p), load_half(p + 2));
  }
};

// Bit i of the word at `p` as the fifth bit of weight i.
inline int fifth_bit(const uint8_t* p, int i) { return (p[i / 8] >> (i % 8) & 1) << 4; }

struct Q5_0 {  // d | fifth bits[4] | nibbles[16]
  static constexpr int kCols = 32, kRows = 1, kBytes = 22;
  static constexpr bool kMinimum = false, kHalves = false;
  static void decode(const uint8_t* p, int, WeightBlock* out) {
    for (int i = 0; i < 16; ++i) {
      out->q[i] = static_cast<int8_t>(((p[6 + i] & 15) | fifth_bit(p + 2, i)) - 16);
      out->q[16 + i] = static_cast<int8_t>((p[6 + i] >> 4 | fifth_bit(p + 2, 16 + i)) - 16);
    }
    set_scale(out, load_half(p), 0);
  }
};

struct Q5_1 {  // d, m | fifth bits[4] | nibbles[16]
  static constexpr int kCols = 32, kRows = 1, kBytes = 24;
  static constexpr bool kMinimum = true, kHalves = false;
  static void decode(const uint8_t* p, int, WeightBlock* out) {
    for (int i = 0; i < 16; ++i) {
      out->q[i] = static_cast<int8_t>((p[8 + i] & 15) | fifth_bit(p + 4, i));
      out->q[16 + i] = static_cast<int8_t>(p[8 + i] >> 4 | fifth_bit(p + 4, 16 + i));
    }
    set_scale(out, load_half(p), load_half(p + 2));
  }
};

// 6-bit scale and minimum of sub-block j of a q4_k or q5_k block, from its 12 packed bytes.
inline void k_scale_min(const uint8_t* packed, int j, int* scale, int* minimum) {
  if (j < 4) {
    *scale = packed[j] & 63;
    *minimum = packed[j + 4] & 63;
  } else {
    *scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
    *minimum = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4;
  }
}

struct Q4_K {  // d, dmin | scales[12] | nibbles[128]: 32 bytes hold sub-block 2i (low) and 2i + 1 (high)
  static constexpr int kCols = 256, kRows = 1, kBytes = 144;
  static constexpr bool kMinimum = true, kHalves = false;
  static void decode(const uint8_t* p, int, WeightBlock* out) {
    const float d = load_half(p), dmin = load_half(p + 2);
    for (int j = 0; j < 8; ++j) {
      const uint8_t* nibbles = p + 16 + 32 * (j / 2);
      for (int i = 0; i < 32; ++i) out[j].q[i] = static_cast<int8_t>(nibbles[i] >> 4 * (j % 2) & 15);
      int scale, minimum;
      k_scale_min(p + 4, j, &scale, &minimum);
      set_scale(&out[j], d * static_cast<float>(scale), -(dmin * static_cast<float>(minimum)));
    }
  }
};

struct Q5_K {  // d, dmin | scales[12] | fifth bits[32]: bit j is of sub-block j | nibbles[128]
  static constexpr int kCols = 256, kRows = 1, kBytes = 176;
  static constexpr bool kMinimum = true, kHalves = false;
  static void decode(const uint8_t* p, int, WeightBlock* out) {
    const float d = load_half(p), dmin = load_half(p + 2);
    for (int j = 0; j < 8; ++j) {
      const uint8_t* nibbles = p + 48 + 32 * (j / 2);
      for (int i = 0; i < 32; ++i) {
        out[j].q[i] = static_cast<int8_t>((nibbles[i] >> 4 * (j % 2) & 15) | (p[16 + i] >> j & 1) << 4);
      }
      int scale, minimum;
      k_scale_min(p + 4, j, &scale, &minimum);
      set_scale(&out[j], d * static_cast<float>(scale), -(dmin * static_cast<float>(minimum)));
    }
  }
};

struct Q6_K {  // nibbles[128] | upper two bits[64] | int8 scales[16] | d; halves of 128 weights, four blocks each
  static constexpr int kCols = 256, kRows = 1, kBytes = 210;
  static constexpr bool kMinimum = false, kHalves = true;
  static void decode(const uint8_t* p, int, WeightBlock* out) {
    const float d = load_half(p + 208);
    for (int j = 0; j < 8; ++j) {
      const uint8_t* nibbles = p + 64 * (j / 4) + 32 * (j % 2);
      const uint8_t* upper = p + 128 + 32 * (j / 4);
      for (int i = 0; i < 32; ++i) {
        const int q = (nibbles[i] >> 4 * (j / 2 % 2) & 15) | (upper[i] >> 2 * (j % 4) & 3) << 4;
        out[j].q[i] = static_cast<int8_t>(q - 32);
      }
      for (int half = 0; half < 2; ++half) {
        out[j].d[half] = d * static_cast<float>(static_cast<int8_t>(p[192 + 2 * j + half]));
      }
      out[j].m = 0;
    }
  }
};

// Ours: bytes of inputs 4k..4k+3 of 16 rows follow one another, so that a 64-byte vector advances 16 outputs by 4
// inputs.

struct Int8Tiles {  // q + 128 [8][16][4] | half scales[16]
  static constexpr int kCols = 32, kRows = kTileRows, kBytes = 544;
  static constexpr bool kMinimum = false, kHalves = false;
  static void decode(const uint8_t* p, int row, WeightBlock* out) {
    uint8_t bytes[32];
    for (int k = 0; k < 8; ++k) std::memcpy(bytes + 4 * k, p + 64 * k + 4 * row, 4);
    for (int i = 0; i < 32; ++i) out->q[i] = static_cast<int8_t>(bytes[i] ^ 128);
    set_scale(out, load_half(p + 512 + 2 * row), 0);
  }
};

struct Int4Tiles {  // nibbles [4][16][4]: low ones are inputs 0..15, high ones 16..31 | half scales[16], minima[16]
  static constexpr int kCols = 32, kRows = kTileRows, kBytes = 320;
  static constexpr bool kMinimum = true, kHalves = false;
  static void decode(const uint8_t* p, int row, WeightBlock* out) {
    uint8_t pairs[16];
    for (int k = 0; k < 4; ++k) std::memcpy(pairs + 4 * k, p + 64 * k + 4 * row, 4);
    for (int i = 0; i < 16; ++i) {
      out->q[i] = static_cast<int8_t>(pairs[i] & 15);
      out->q[16 + i] = static_cast<int8_t>(pairs[i] >> 4);
    }
    set_scale(out, load_half(p + 256 + 2 * row), load_half(p + 288 + 2 * row));
  }
};

template <class Format>
const uint8_t* row_start(const Matrix& w, int64_t row) {
  return w.data + row / Format::kRows * (w.cols / Format::kCols) * Format::kBytes;
}

// Calls f(Format{}) with the format of `type`; false where it has none.
template <class Function>
bool with_format(WeightType type, Function&& f) {
  switch (type) {
    case WeightType::q8_0: f(Q8_0{}); return true;
    case WeightType::q4_0: f(Q4_0{}); return true;
    case WeightType::q4_1: f(Q4_1{}); return true;
    case WeightType::q5_0: f(Q5_0{}); return true;
    case WeightType::q5_1: f(Q5_1{}); return true;
    case WeightType::q4_k: f(Q4_K{}); return true;
    case WeightType::q5_k: f(Q5_K{}); return true;
    case WeightType::q6_k: f(Q6_K{}); return true;
    case WeightType::int8_tiles: f(Int8Tiles{}); return true;
    case WeightType::int4_tiles: f(Int4Tiles{}); return true;
    default: return false;
  }
}

}  // namespace
}  // namespace quantized
}  // namespace shoestring
