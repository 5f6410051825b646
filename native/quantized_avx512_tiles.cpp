// AVX-512 VNNI: our packed tiles, which are as the dot instructions want them; and the rounding of activations.
#include "quantized_avx512.hpp"
#include "quantized_formats.hpp"

namespace shoestring {
namespace quantized {
namespace {

struct Int8Source {
  static constexpr int kBytes = Int8Tiles::kBytes;
  static constexpr Scaling kScaling = Scaling::symmetric;
  static SHOESTRING_INLINE TileBlock load(const uint8_t* p) {
    TileBlock block;
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) block.u[k] = load_bytes(p + 64 * k);
    block.d = block.e = load_halves(p + 512);
    return block;
  }
};

struct Int4Source {
  static constexpr int kBytes = Int4Tiles::kBytes;
  static constexpr Scaling kScaling = Scaling::minimum;
  static SHOESTRING_INLINE TileBlock load(const uint8_t* p) {
    const __m512i low_nibble = _mm512_set1_epi8(15);
    TileBlock block;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512i pairs = load_bytes(p + 64 * k);
      block.u[k] = _mm512_and_si512(pairs, low_nibble);
      block.u[4 + k] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low_nibble);
    }
    block.d = load_halves(p + 256);
    block.e = load_halves(p + 288);
    return block;
  }
};

constexpr int kStreamAhead = 4096;

template <class Source>
void multiply(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  const int64_t blocks = w.cols / kBlockCols;
  for (int64_t row = first; row < last; row += kTileRows) {
    const uint8_t* tile = w.data + row / kTileRows * blocks * Source::kBytes;
    // One pass streams: a little ahead suffices. Several passes compute meanwhile: they fetch the next tile.
    const Ahead ahead{T <= kMaxRows ? tile + kStreamAhead : tile + blocks * Source::kBytes, Source::kBytes};
    multiply_tile_rows<Source>(tile, blocks, x, x_stride, T, y + row, y_stride, lanes(row, first, last), false, ahead);
  }
}

}  // namespace

const Kernel* avx512_tiles_kernel(WeightType type) {
  static const Kernel int8{ActivationFormat::int8_blocks, multiply<Int8Source>, kTileRows};
  static const Kernel int4{ActivationFormat::int8_blocks, multiply<Int4Source>, kTileRows};
  return type == WeightType::int8_tiles ? &int8 : type == WeightType::int4_tiles ? &int4 : nullptr;
}

void prepare_avx512(const float* x, int64_t cols, ActivationBlock* out) {
  const __m512 largest_float = _mm512_set1_ps(3.402823466e+38f);
  for (int64_t col = 0; col < cols; col += kBlockCols, ++out) {
    const int64_t left = cols - col;
    const __mmask16 low_mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __mmask16 high_mask = left >= 32 ? 0xffff : left <= 16 ? 0 : static_cast<__mmask16>((1u << (left - 16)) - 1);
    const __m512 low = _mm512_maskz_loadu_ps(low_mask, x + col);
    const __m512 high = _mm512_maskz_loadu_ps(high_mask, x + col + 16);
    const __m512 low_size = _mm512_abs_ps(low), high_size = _mm512_abs_ps(high);
    const bool finite = (_mm512_cmp_ps_mask(low_size, largest_float, _CMP_LE_OQ) &
                         _mm512_cmp_ps_mask(high_size, largest_float, _CMP_LE_OQ)) == 0xffff;
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(low_size, high_size));
    if (!finite || !(largest >= kSmallestActivation)) {  // see prepare_portable
      std::memset(out, 0, sizeof(ActivationBlock));
      if (!finite) out->scale = out->sum = __builtin_nanf("");
      continue;
    }
    const __m512 inverse = _mm512_set1_ps(127.0f / largest);
    const __m512i low_values = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    const __m512i high_values = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out->values), _mm512_cvtepi32_epi8(low_values));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out->values + 16), _mm512_cvtepi32_epi8(high_values));
    const int32_t low_sum = _mm512_reduce_add_epi32(low_values), high_sum = _mm512_reduce_add_epi32(high_values);
    out->scale = largest / 127.0f;
    out->sum = out->scale * static_cast<float>(low_sum + high_sum);
    out->bias = -128 * (low_sum + high_sum);
    out->bias_high = -128 * high_sum;
  }
}

}  // namespace quantized
}  // namespace shoestring
