// Rounding fp32 weights into our int8 and int4 tiles.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "quantized_formats.hpp"

namespace shoestring {
namespace {

using quantized::Int4Tiles;
using quantized::Int8Tiles;

uint16_t float_to_half(float value) {  // to nearest, ties to even; beyond the range: the largest finite half
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (!(size < 65504.0f)) return sign | 0x7bff;
  if (size < 6.103515625e-5f) return sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.0f));  // subnormal
  bits &= 0x7fffffff;
  return sign | static_cast<uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

float rounded_to_half(float value) { return quantized::half_to_float(float_to_half(value)); }

void store_half(uint8_t* p, float value) {
  const uint16_t half = float_to_half(value);
  std::memcpy(p, &half, 2);
}

// A scale and a minimum, and the squared error of rounding the block with them.
struct Grid {
  float scale, minimum, error;
};

float inverse_of(float scale) { return scale > 0 ? 1 / scale : 0; }

// Of 0..15; a negative level (also one of an infinite weight) is 0.
inline int nearest_level(float w, const Grid& grid, float inverse) {
  float level = (w - grid.minimum) * inverse;
  level = level > 0.0f ? level : 0.0f;
  level = level < 15.0f ? level : 15.0f;
  return static_cast<int>(level + 0.5f);
}

constexpr int kLanes = 8;  // independent sums, for the vectoriser

float total(const float* sums) {
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void measure(const float* w, Grid* grid) {
  const Grid by = *grid;
  const float inverse = inverse_of(by.scale);
  float errors[kLanes] = {};
  for (int i = 0; i < kBlockCols; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float level = static_cast<float>(nearest_level(w[i + j], by, inverse));
      const float gap = by.minimum + by.scale * level - w[i + j];
      errors[j] += gap * gap;
    }
  }
  grid->error = total(errors);
}

// The least-squares scale and minimum for the levels that `grid` rounds to, in the precision they are stored in.
Grid refit(const float* w, const Grid& grid) {
  const Grid by = grid;
  const float inverse = inverse_of(by.scale);
  float sums_q[kLanes] = {}, sums_qq[kLanes] = {}, sums_w[kLanes] = {}, sums_qw[kLanes] = {};
  for (int i = 0; i < kBlockCols; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float level = static_cast<float>(nearest_level(w[i + j], by, inverse));
      sums_q[j] += level;
      sums_qq[j] += level * level;
      sums_w[j] += w[i + j];
      sums_qw[j] += level * w[i + j];
    }
  }
  const float sum_q = total(sums_q), sum_w = total(sums_w);
  Grid fitted = grid;
  const float determinant = kBlockCols * total(sums_qq) - sum_q * sum_q;
  if (determinant > 0) {
    fitted.scale = (kBlockCols * total(sums_qw) - sum_q * sum_w) / determinant;
    fitted.minimum = (sum_w - fitted.scale * sum_q) / kBlockCols;
  }
  fitted.scale = rounded_to_half(std::max(0.0f, fitted.scale));
  fitted.minimum = rounded_to_half(fitted.minimum);
  measure(w, &fitted);
  return fitted;
}

// Start from ranges a little narrower and wider than the block's own, refit each, keep the best.
Grid best_grid(const float* w) {
  const float low = *std::min_element(w, w + kBlockCols), high = *std::max_element(w, w + kBlockCols);
  Grid best{rounded_to_half((high - low) / 15), rounded_to_half(low), 0};
  measure(w, &best);
  if (!(high > low)) return best;
  constexpr int kTrials = 6;
  for (int trial = 0; trial < kTrials; ++trial) {
    const float levels = 13.0f + 3.0f * static_cast<float>(trial) / (kTrials - 1);  // 13..16 levels cover the range
    Grid grid{(high - low) / levels, low, 0};
    grid.minimum += (high - low - 15 * grid.scale) / 2;  // clip, or reach out, evenly on both sides
    for (int round = 0; round < 2; ++round) {
      grid = refit(w, grid);
      if (grid.error < best.error) best = grid;
    }
  }
  return best;
}

}  // namespace

void pack_int8_tiles(const float* w, int64_t rows, int64_t cols, uint8_t* out) {
  for (int64_t tile = 0; tile < rows; tile += kTileRows) {
    for (int64_t col = 0; col < cols; col += kBlockCols, out += Int8Tiles::kBytes) {
      std::memset(out, 128, 512);
      std::memset(out + 512, 0, 2 * kTileRows);
      for (int lane = 0; lane < kTileRows && tile + lane < rows; ++lane) {
        const float* block = w + (tile + lane) * cols + col;
        float largest = 0;
        for (int i = 0; i < kBlockCols; ++i) largest = std::max(largest, std::fabs(block[i]));
        const float scale = rounded_to_half(largest / 127);
        const float inverse = inverse_of(scale);
        for (int i = 0; i < kBlockCols; ++i) {
          const float level = std::min(127.0f, std::max(-127.0f, block[i] * inverse));
          out[i / 4 * 64 + lane * 4 + i % 4] = static_cast<uint8_t>(static_cast<int>(std::nearbyint(level)) + 128);
        }
        store_half(out + 512 + 2 * lane, scale);
      }
    }
  }
}

void pack_int4_tiles(const float* w, int64_t rows, int64_t cols, uint8_t* out) {
  for (int64_t tile = 0; tile < rows; tile += kTileRows) {
    for (int64_t col = 0; col < cols; col += kBlockCols, out += Int4Tiles::kBytes) {
      std::memset(out, 0, Int4Tiles::kBytes);
      for (int lane = 0; lane < kTileRows && tile + lane < rows; ++lane) {
        const float* block = w + (tile + lane) * cols + col;
        const Grid grid = best_grid(block);
        const float inverse = inverse_of(grid.scale);
        for (int i = 0; i < 16; ++i) {
          const int low = nearest_level(block[i], grid, inverse), high = nearest_level(block[16 + i], grid, inverse);
          out[i / 4 * 64 + lane * 4 + i % 4] = static_cast<uint8_t>(low | high << 4);
        }
        store_half(out + 256 + 2 * lane, grid.scale);
        store_half(out + 288 + 2 * lane, grid.minimum);
      }
    }
  }
}

}  // namespace shoestring
