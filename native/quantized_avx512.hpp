// What the AVX-512 VNNI kernels share: sixteen output rows a vector, by blocks of 32 inputs.
//
// A vector's 32-bit lane is an output row, its four bytes are four inputs. One vpdpbusd with four broadcast activations
// so advances 16 outputs by 4 inputs, and nothing is ever summed across lanes. Weights are its unsigned side.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "quantized.hpp"

#define SHOESTRING_INLINE inline __attribute__((always_inline))

namespace shoestring {
namespace quantized {
namespace {

constexpr int kMaxRows = 8;  // activation rows that one pass over a tile's weights serves from registers

// Bytes of 16 rows, `stride` apart.
struct RowBytes {
  const uint8_t* p;
  int64_t stride;

  SHOESTRING_INLINE RowBytes operator+(int64_t offset) const { return {p + offset, stride}; }

  // A 32-bit word of each row: [16 rows]
  SHOESTRING_INLINE __m512i words() const {
    const __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_i32gather_epi32(_mm512_mullo_epi32(rows, _mm512_set1_epi32(static_cast<int>(stride))), p, 1);
  }

  // 16 bytes of rows r, r + 4, r + 8, r + 12.
  SHOESTRING_INLINE __m512i four_rows(int r) const {
    const uint8_t* row = p + r * stride;
    __m512i four = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    four = _mm512_inserti32x4(four, _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * stride)), 1);
    four = _mm512_inserti32x4(four, _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 8 * stride)), 2);
    return _mm512_inserti32x4(four, _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 12 * stride)), 3);
  }

  // 16 bytes of each row: out[k] holds bytes 4k..4k+3 of all rows, in order.
  SHOESTRING_INLINE void transpose16(__m512i* out) const {
    const __m512i a = four_rows(0), b = four_rows(1), c = four_rows(2), d = four_rows(3);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    out[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
    out[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    out[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    out[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
  }

  SHOESTRING_INLINE void transpose32(__m512i* out) const {
    transpose16(out);
    (*this + 16).transpose16(out + 4);
  }
};

SHOESTRING_INLINE __m512 low_halves(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
SHOESTRING_INLINE __m512 high_halves(__m512i words) { return low_halves(_mm512_srli_epi32(words, 16)); }

enum class Scaling {
  symmetric,  // w = d * (u - 128)
  minimum,    // w = d * u + e
  halves,     // w = d * (u - 128) for the first 16 inputs, e * (u - 128) for the others
};

// Weights of 16 rows by 32 inputs in registers.
struct TileBlock {
  __m512i u[8];  // unsigned bytes [16 rows][4 inputs] each
  __m512 d, e;   // [16 rows]
};

SHOESTRING_INLINE __m512i load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }

SHOESTRING_INLINE __m512i broadcast_four(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

SHOESTRING_INLINE __m512 load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <Scaling scaling>
SHOESTRING_INLINE __m512 multiply_add(__m512 sum, const TileBlock& w, const ActivationBlock& x) {
  const bool biased = scaling != Scaling::minimum;
  // Two chains of four, for latency.
  __m512i low = biased ? _mm512_set1_epi32(x.bias) : _mm512_setzero_si512(), high = _mm512_setzero_si512();
  if (scaling == Scaling::halves) {
    high = _mm512_set1_epi32(x.bias_high);
    low = _mm512_sub_epi32(low, high);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    low = _mm512_dpbusd_epi32(low, w.u[k], broadcast_four(x.values + 4 * k));
    high = _mm512_dpbusd_epi32(high, w.u[4 + k], broadcast_four(x.values + 16 + 4 * k));
  }
  const __m512 scale = _mm512_set1_ps(x.scale);
  if (scaling == Scaling::halves) {
    const __m512 both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), w.e, _mm512_mul_ps(_mm512_cvtepi32_ps(low), w.d));
    return _mm512_fmadd_ps(both, scale, sum);
  }
  const __m512 dots = _mm512_cvtepi32_ps(_mm512_add_epi32(low, high));
  sum = _mm512_fmadd_ps(dots, _mm512_mul_ps(w.d, scale), sum);
  if (scaling == Scaling::minimum) sum = _mm512_fmadd_ps(w.e, _mm512_set1_ps(x.sum), sum);
  return sum;
}

SHOESTRING_INLINE void store_sums(float* y, __mmask16 rows, __m512 sums, bool add) {
  if (add) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(rows, y));
  _mm512_mask_storeu_ps(y, rows, sums);
}

// Weights to be read soon, fetched into the second-level cache (more than the first holds) while computing with the
// current ones: `step` bytes per block and pass.
struct Ahead {
  const uint8_t* p;
  int64_t step;

  SHOESTRING_INLINE void fetch() {
    for (int64_t byte = 0; byte < step; byte += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(p + byte), _MM_HINT_T1);
    }
    p += step;
  }
};

// y[n][0..16) (+)= N activation rows times `count` blocks of a tile. `Source` loads a block: kBytes, kScaling, load(p).
template <class Source, int N>
void multiply_tile(const uint8_t* tile, int64_t count, const uint8_t* x, size_t x_stride, float* y, int64_t y_stride,
                   __mmask16 rows, bool add, Ahead ahead) {
  __m512 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm512_setzero_ps();
  for (int64_t b = 0; b < count; ++b, tile += Source::kBytes, x += sizeof(ActivationBlock)) {
    ahead.fetch();
    const TileBlock w = Source::load(tile);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sums[n] = multiply_add<Source::kScaling>(sums[n], w, *reinterpret_cast<const ActivationBlock*>(x + n * x_stride));
    }
  }
  for (int n = 0; n < N; ++n) store_sums(y + n * y_stride, rows, sums[n], add);
}

// The same for any number of activation rows.
template <class Source>
void multiply_tile_rows(const uint8_t* tile, int64_t count, const uint8_t* x, size_t x_stride, int T, float* y,
                        int64_t y_stride, __mmask16 rows, bool add, Ahead ahead) {
  using Multiply = void (*)(const uint8_t*, int64_t, const uint8_t*, size_t, float*, int64_t, __mmask16, bool, Ahead);
  static constexpr Multiply kMultiply[kMaxRows] = {
      multiply_tile<Source, 1>, multiply_tile<Source, 2>, multiply_tile<Source, 3>, multiply_tile<Source, 4>,
      multiply_tile<Source, 5>, multiply_tile<Source, 6>, multiply_tile<Source, 7>, multiply_tile<Source, 8>};
  const int64_t passes = (T + kMaxRows - 1) / kMaxRows;
  ahead.step = (ahead.step + passes - 1) / passes;
  for (int t = 0; t < T; t += kMaxRows, ahead.p += count * ahead.step) {
    const int n = T - t < kMaxRows ? T - t : kMaxRows;
    kMultiply[n - 1](tile, count, x + t * x_stride, x_stride, y + t * y_stride, y_stride, rows, add, ahead);
  }
}

// Lanes of the tile at `start` that lie in [first, last).
SHOESTRING_INLINE __mmask16 lanes(int64_t start, int64_t first, int64_t last) {
  const int64_t begin = first > start ? first - start : 0;
  const int64_t end = last - start < kTileRows ? last - start : kTileRows;
  return static_cast<__mmask16>((1u << end) - (1u << begin));
}

}  // namespace

const Kernel* avx512_tiles_kernel(WeightType type);
const Kernel* avx512_half_kernel();

}  // namespace quantized
}  // namespace shoestring
