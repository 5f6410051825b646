// AVX-512 VNNI: GGUF's block types, decoded sixteen rows at a time into the tiles' order of bytes: in registers for one
// activation row, through the first-level cache for several.
#include "quantized_avx512.hpp"
#include "quantized_formats.hpp"

namespace shoestring {
namespace quantized {
namespace {

// Decoders: decode(rows, emit) calls emit(j, TileBlock) for each 32 inputs j of one block of the format.

template <class Format>
struct Decoder;

template <>
struct Decoder<Q8_0> {
  static constexpr Scaling kScaling = Scaling::symmetric;
  template <class Emit>
  static SHOESTRING_INLINE void decode(RowBytes rows, Emit&& emit) {
    TileBlock block;
    (rows + 2).transpose32(block.u);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) block.u[k] = _mm512_xor_si512(block.u[k], _mm512_set1_epi8(-128));
    block.d = block.e = low_halves(rows.words());
    emit(0, block);
  }
};

template <>
struct Decoder<Q4_0> {
  static constexpr Scaling kScaling = Scaling::symmetric;
  template <class Emit>
  static SHOESTRING_INLINE void decode(RowBytes rows, Emit&& emit) {
    // 16 * nibble = 16 * (nibble - 8) + 128: the upper half of the byte as it is.
    const __m512i upper = _mm512_set1_epi8(-16);
    __m512i pairs[4];
    (rows + 2).transpose16(pairs);
    TileBlock block;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      block.u[k] = _mm512_and_si512(_mm512_slli_epi16(pairs[k], 4), upper);
      block.u[4 + k] = _mm512_and_si512(pairs[k], upper);
    }
    block.d = block.e = _mm512_mul_ps(low_halves(rows.words()), _mm512_set1_ps(1.0f / 16));
    emit(0, block);
  }
};

template <>
struct Decoder<Q4_1> {
  static constexpr Scaling kScaling = Scaling::minimum;
  template <class Emit>
  static SHOESTRING_INLINE void decode(RowBytes rows, Emit&& emit) {
    const __m512i lower = _mm512_set1_epi8(15);
    __m512i pairs[4];
    (rows + 4).transpose16(pairs);
    TileBlock block;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      block.u[k] = _mm512_and_si512(pairs[k], lower);
      block.u[4 + k] = _mm512_and_si512(_mm512_srli_epi16(pairs[k], 4), lower);
    }
    const __m512i words = rows.words();
    block.d = low_halves(words);
    block.e = high_halves(words);
    emit(0, block);
  }
};

// Where a word of fifth bits sets them: bytes of inputs 4k..4k+3 in each lane.
SHOESTRING_INLINE __mmask64 fifth_bits(__m512i words, int k) {
  const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0x00000000);
  const __m512i byte = _mm512_shuffle_epi8(words, _mm512_add_epi8(lane, _mm512_set1_epi8(static_cast<char>(k / 2))));
  return _mm512_test_epi8_mask(byte, _mm512_set1_epi32(k % 2 ? static_cast<int>(0x80402010u) : 0x08040201));
}

template <>
struct Decoder<Q5_0> {
  static constexpr Scaling kScaling = Scaling::symmetric;
  template <class Emit>
  static SHOESTRING_INLINE void decode(RowBytes rows, Emit&& emit) {
    // 8 * q = 8 * (q - 16) + 128: the fifth bit on top of the byte.
    const __m512i place = _mm512_set1_epi8(0x78), top = _mm512_set1_epi8(-128);
    __m512i pairs[4];
    (rows + 6).transpose16(pairs);
    const __m512i words = (rows + 2).words();
    TileBlock block;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512i low = _mm512_and_si512(_mm512_slli_epi16(pairs[k], 3), place);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs[k], 1), place);
      block.u[k] = _mm512_mask_add_epi8(low, fifth_bits(words, k), low, top);
      block.u[4 + k] = _mm512_mask_add_epi8(high, fifth_bits(words, 4 + k), high, top);
    }
    block.d = block.e = _mm512_mul_ps(low_halves(rows.words()), _mm512_set1_ps(1.0f / 8));
    emit(0, block);
  }
};

template <>
struct Decoder<Q5_1> {
  static constexpr Scaling kScaling = Scaling::minimum;
  template <class Emit>
  static SHOESTRING_INLINE void decode(RowBytes rows, Emit&& emit) {
    const __m512i lower = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
    __m512i pairs[4];
    (rows + 8).transpose16(pairs);
    const __m512i bits = (rows + 4).words(), words = rows.words();
    TileBlock block;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512i low = _mm512_and_si512(pairs[k], lower);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs[k], 4), lower);
      block.u[k] = _mm512_mask_add_epi8(low, fifth_bits(bits, k), low, fifth);
      block.u[4 + k] = _mm512_mask_add_epi8(high, fifth_bits(bits, 4 + k), high, fifth);
    }
    block.d = low_halves(words);
    block.e = high_halves(words);
    emit(0, block);
  }
};

// The first 16 bytes of a q4_k or q5_k block of 16 rows.
struct KScales {
  __m512 d, minus_dmin;
  __m512i low[2], high[2];  // bytes j % 4: scale ([0]) and minimum ([1]) of sub-blocks 0..3, 4..7

  SHOESTRING_INLINE explicit KScales(RowBytes rows) {
    __m512i words[4];
    rows.transpose16(words);
    d = low_halves(words[0]);
    minus_dmin = _mm512_sub_ps(_mm512_setzero_ps(), high_halves(words[0]));
    const __m512i six_bits = _mm512_set1_epi8(63), lower = _mm512_set1_epi8(15), top = _mm512_set1_epi8(48);
    low[0] = _mm512_and_si512(words[1], six_bits);
    low[1] = _mm512_and_si512(words[2], six_bits);
    high[0] = _mm512_or_si512(_mm512_and_si512(words[3], lower), _mm512_and_si512(_mm512_srli_epi16(words[1], 2), top));
    high[1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(words[3], 4), lower),
                              _mm512_and_si512(_mm512_srli_epi16(words[2], 2), top));
  }

  SHOESTRING_INLINE __m512 value(int which, int j) const {
    const __m512i bytes = j < 4 ? low[which] : high[which];
    const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(bytes, 8 * (j % 4)), _mm512_set1_epi32(255));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(byte), which ? minus_dmin : d);
  }
};

template <>
struct Decoder<Q4_K> {
  static constexpr Scaling kScaling = Scaling::minimum;
  template <class Emit>
  static SHOESTRING_INLINE void decode(RowBytes rows, Emit&& emit) {
    const __m512i lower = _mm512_set1_epi8(15);
    const KScales scales(rows);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      __m512i nibbles[8];
      (rows + (16 + 32 * pair)).transpose32(nibbles);
      TileBlock block;
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) block.u[k] = _mm512_and_si512(nibbles[k], lower);
      block.d = scales.value(0, 2 * pair);
      block.e = scales.value(1, 2 * pair);
      emit(2 * pair, block);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) block.u[k] = _mm512_and_si512(_mm512_srli_epi16(nibbles[k], 4), lower);
      block.d = scales.value(0, 2 * pair + 1);
      block.e = scales.value(1, 2 * pair + 1);
      emit(2 * pair + 1, block);
    }
  }
};

template <>
struct Decoder<Q5_K> {
  static constexpr Scaling kScaling = Scaling::minimum;
  template <class Emit>
  static SHOESTRING_INLINE void decode(RowBytes rows, Emit&& emit) {
    const __m512i lower = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
    const KScales scales(rows);
    __m512i bits[8];
    (rows + 16).transpose32(bits);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      __m512i nibbles[8];
      (rows + (48 + 32 * pair)).transpose32(nibbles);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * pair + half;
        TileBlock block;
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
          const __m512i nibble = _mm512_and_si512(half ? _mm512_srli_epi16(nibbles[k], 4) : nibbles[k], lower);
          const __m512i bit =
              j < 4 ? _mm512_slli_epi16(bits[k], j < 4 ? 4 - j : 0) : _mm512_srli_epi16(bits[k], j < 4 ? 0 : j - 4);
          block.u[k] = _mm512_or_si512(nibble, _mm512_and_si512(bit, fifth));
        }
        block.d = scales.value(0, j);
        block.e = scales.value(1, j);
        emit(j, block);
      }
    }
  }
};

template <>
struct Decoder<Q6_K> {
  static constexpr Scaling kScaling = Scaling::halves;
  template <class Emit>
  static SHOESTRING_INLINE void decode(RowBytes rows, Emit&& emit) {
    // 4 * q = 4 * (q - 32) + 128: the six bits at the top of the byte.
    const __m512i nibble_place = _mm512_set1_epi8(0x3c), upper_place = _mm512_set1_epi8(-64);
    __m512i scales[4];
    (rows + 192).transpose16(scales);
    // The word before the block's end: d is its upper half.
    const __m512 d = _mm512_mul_ps(high_halves((rows + 206).words()), _mm512_set1_ps(0.25f));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i upper[8];
      (rows + (128 + 32 * half)).transpose32(upper);
      __m512i nibbles[2][8];
      (rows + 64 * half).transpose32(nibbles[0]);
      (rows + (64 * half + 32)).transpose32(nibbles[1]);
      // In the order of the inputs, in which all kernels sum.
#pragma GCC unroll 2
      for (int high = 0; high < 2; ++high) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const int j = 4 * half + 2 * high + odd;
          TileBlock block;
#pragma GCC unroll 8
          for (int k = 0; k < 8; ++k) {
            const __m512i nibble = high ? _mm512_srli_epi16(nibbles[odd][k], 2) : _mm512_slli_epi16(nibbles[odd][k], 2);
            const __m512i top = _mm512_slli_epi16(upper[k], 6 - 2 * (j % 4));
            block.u[k] = _mm512_or_si512(_mm512_and_si512(nibble, nibble_place), _mm512_and_si512(top, upper_place));
          }
          const __m512i words = scales[j / 2];
          block.d = scaled(d, _mm512_slli_epi32(words, 24 - 16 * (j % 2)));
          block.e = scaled(d, _mm512_slli_epi32(words, 16 - 16 * (j % 2)));
          emit(j, block);
        }
      }
    }
  }
  static SHOESTRING_INLINE __m512 scaled(__m512 d, __m512i byte_on_top) {
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(byte_on_top, 24)));
  }
};

constexpr int kChunkBlocks = 32;  // 1024 columns: a decoded chunk takes 20 KiB of the first-level cache

// A decoded block in memory.
template <Scaling scaling>
struct Decoded {
  static constexpr int kBytes = 640;
  static constexpr Scaling kScaling = scaling;

  static SHOESTRING_INLINE void store(uint8_t* p, const TileBlock& block) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) _mm512_store_si512(p + 64 * k, block.u[k]);
    _mm512_store_ps(p + 512, block.d);
    _mm512_store_ps(p + 576, block.e);
  }
  static SHOESTRING_INLINE TileBlock load(const uint8_t* p) {
    TileBlock block;
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) block.u[k] = _mm512_load_si512(p + 64 * k);
    block.d = _mm512_load_ps(p + 512);
    block.e = _mm512_load_ps(p + 576);
    return block;
  }
};

template <class Format>
SHOESTRING_INLINE void multiply_one(RowBytes rows, int64_t blocks, const uint8_t* x, float* y, __mmask16 mask) {
  constexpr int kBlocks = Format::kCols / kBlockCols;
  const auto* xb = reinterpret_cast<const ActivationBlock*>(x);
  __m512 sum = _mm512_setzero_ps(), total = sum;
  // The next sixteen rows follow these; read ahead of the many short streams that a prefetcher would have to track.
  Ahead ahead{rows.p + kTileRows * rows.stride, kTileRows * Format::kBytes};
  for (int64_t b = 0; b < blocks; b += kBlocks, rows = rows + Format::kBytes) {
    if (b > 0 && b % kChunkBlocks == 0) {  // summed in the order of `multiply_many`: a row's result is the same in every step
      total = b == kChunkBlocks ? sum : _mm512_add_ps(sum, total);
      sum = _mm512_setzero_ps();
    }
    ahead.fetch();
    Decoder<Format>::decode(rows, [&](int j, const TileBlock& w) __attribute__((always_inline)) {
      sum = multiply_add<Decoder<Format>::kScaling>(sum, w, xb[b + j]);
    });
  }
  store_sums(y, mask, blocks > kChunkBlocks ? _mm512_add_ps(sum, total) : sum, false);
}

template <class Format>
void multiply_many(RowBytes rows, int64_t blocks, const uint8_t* x, size_t x_stride, int T, float* y, int64_t y_stride,
                   __mmask16 mask) {
  constexpr int kBlocks = Format::kCols / kBlockCols;
  using Source = Decoded<Decoder<Format>::kScaling>;
  const uint8_t* next = rows.p + kTileRows * rows.stride;  // the next sixteen rows, fetched during the products
  alignas(64) uint8_t decoded[kChunkBlocks * Source::kBytes];
  for (int64_t begin = 0; begin < blocks; begin += kChunkBlocks) {
    const int64_t count = blocks - begin < kChunkBlocks ? blocks - begin : kChunkBlocks;
    for (int64_t b = 0; b < count; b += kBlocks, rows = rows + Format::kBytes) {
      Decoder<Format>::decode(rows, [&](int j, const TileBlock& w) __attribute__((always_inline)) {
        Source::store(decoded + (b + j) * Source::kBytes, w);
      });
    }
    const Ahead ahead{next, kTileRows * Format::kBytes / kBlocks};
    next += count * ahead.step;
    multiply_tile_rows<Source>(decoded, count, x + begin * sizeof(ActivationBlock), x_stride, T, y, y_stride, mask,
                               begin > 0, ahead);
  }
}

template <class Format>
void multiply(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  const int64_t blocks = w.cols / kBlockCols, stride = w.cols / Format::kCols * Format::kBytes;
  int64_t rows = w.rows;
  const uint8_t* data = w.data;
  if (rows < kTileRows) {  // fill the tile up with zeros
    uint8_t* padded = scratch(static_cast<size_t>(kTileRows * stride));
    std::memcpy(padded, data, static_cast<size_t>(rows * stride));
    std::memset(padded + rows * stride, 0, static_cast<size_t>((kTileRows - rows) * stride));
    data = padded;
    rows = kTileRows;
  }
  for (int64_t row = first; row < last; row += kTileRows) {
    // The last tile of the matrix begins early enough to be whole; rows before `row` are computed but not stored.
    const int64_t start = row < rows - kTileRows ? row : rows - kTileRows;
    const RowBytes bytes{data + start * stride, stride};
    const __mmask16 mask = lanes(start, row, last);
    if (T == 1) {
      multiply_one<Format>(bytes, blocks, x, y + start, mask);
    } else {
      multiply_many<Format>(bytes, blocks, x, x_stride, T, y + start, y_stride, mask);
    }
  }
}

template <class Format>
const Kernel* kernel() {
  static const Kernel found{ActivationFormat::int8_blocks, multiply<Format>, kTileRows};
  return &found;
}

}  // namespace

const Kernel* avx512_vnni_kernel(WeightType type) {
  switch (type) {
    case WeightType::q8_0: return kernel<Q8_0>();
    case WeightType::q4_0: return kernel<Q4_0>();
    case WeightType::q4_1: return kernel<Q4_1>();
    case WeightType::q5_0: return kernel<Q5_0>();
    case WeightType::q5_1: return kernel<Q5_1>();
    case WeightType::q4_k: return kernel<Q4_K>();
    case WeightType::q5_k: return kernel<Q5_K>();
    case WeightType::q6_k: return kernel<Q6_K>();
    case WeightType::f16: return avx512_half_kernel();
    default: return avx512_tiles_kernel(type);
  }
}

}  // namespace quantized
}  // namespace shoestring
