// Few-row matrix products with float and bfloat16 weights, over the vectors of one instruction set.
//
// Each output is one sum that runs over the inputs in order, whatever the number of rows: a row's result does not
// depend on the other rows of its step.
namespace shoestring {
namespace SHOESTRING_ISA {
namespace {

#if defined(__clang__)
#define SHOESTRING_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define SHOESTRING_UNROLL _Pragma("GCC unroll 24")
#else
#define SHOESTRING_UNROLL
#endif

// How a tile of sixteen outputs lies in memory, one step (64 bytes) after another, and what its activations are.
enum class Tile {
  floats,  // a step is one input;  activations are floats
  pairs,   // a step is two inputs, bfloat16 pairs; activations are floats
  dots     // a step is two inputs, bfloat16 pairs; activations are bfloat16
};

// Bytes ahead in the stream of one tile. The next tiles come to the second-level cache meanwhile: measured, that is what
// lets few rows run at the memory's speed.
constexpr int kPrefetchDistance = 512;

struct TileRun {
  const uint8_t* w;
  size_t tile_stride;  // bytes from one tile of sixteen outputs to the next
  size_t step_stride;  // bytes from one step to the next
  int64_t steps;
  const uint8_t* x;
  size_t x_stride;     // bytes
  float* y;
  int64_t y_stride;    // floats
  const uint8_t* ahead;   // what to prefetch meanwhile
  int64_t ahead_lines;
};

template <Tile kTile, int R, int N>
void tile_block(const TileRun& run) {
  F16 sums[R][N];
  SHOESTRING_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = zero();
  }
  const uint8_t* w = run.w;
  const size_t tile_stride = run.tile_stride, step_stride = run.step_stride;
  // Four rows share a pointer: addresses then need few registers.
  constexpr int kBases = (R + 3) / 4;
  const size_t stride = run.x_stride, stride2 = 2 * stride, stride3 = 3 * stride;
  const uint8_t* bases[kBases];
  for (int b = 0; b < kBases; ++b) bases[b] = run.x + 4 * b * stride;
  const auto input = [&](int r) {
    return bases[r / 4] + (r % 4 == 0 ? 0 : r % 4 == 1 ? stride : r % 4 == 2 ? stride2 : stride3);
  };
  const auto multiply = [&](const F16(&weights)[N], int offset) {
    SHOESTRING_UNROLL
    for (int r = 0; r < R; ++r) {
      const F16 value = broadcast(*reinterpret_cast<const float*>(input(r) + offset));
      for (int n = 0; n < N; ++n) sums[r][n] = fma(weights[n], value, sums[r][n]);
    }
  };
  const uint8_t* ahead = run.ahead;
  const uint8_t* const ahead_end = ahead + 64 * run.ahead_lines;
  for (int64_t step = 0; step < run.steps; ++step) {
    [[maybe_unused]] F16 weights[N];
    if constexpr (kTile == Tile::floats) {
      for (int n = 0; n < N; ++n) weights[n] = load(reinterpret_cast<const float*>(w + n * tile_stride));
      multiply(weights, 0);
    } else if constexpr (kTile == Tile::pairs) {
      for (int n = 0; n < N; ++n) weights[n] = low_halves(w + n * tile_stride);
      multiply(weights, 0);
      for (int n = 0; n < N; ++n) weights[n] = high_halves(w + n * tile_stride);
      multiply(weights, 4);
    } else {
#if defined(__AVX512BF16__)
      Pairs pairs[N];
      for (int n = 0; n < N; ++n) pairs[n] = load_pairs(w + n * tile_stride);
      SHOESTRING_UNROLL
      for (int r = 0; r < R; ++r) {
        const Pairs value = broadcast_pair(input(r));
        for (int n = 0; n < N; ++n) sums[r][n] = dot_pairs(sums[r][n], pairs[n], value);
      }
#endif
    }
    for (int b = 0; b < kBases; ++b) bases[b] += kTile == Tile::pairs ? 8 : 4;
    for (int n = 0; n < N; ++n) prefetch(w + n * tile_stride + kPrefetchDistance);
    w += step_stride;
    if (ahead < ahead_end) {
      for (int n = 0; n < N; ++n) prefetch_far(ahead + 64 * n);
      ahead += 64 * N;
    }
  }
  SHOESTRING_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) store(run.y + r * run.y_stride + 16 * n, sums[r][n]);
  }
}

using TileFunction = void (*)(const TileRun&);

constexpr int tiles_for(int rows) {
  const int fit = kAccumulators / (rows < 1 ? 1 : rows);
  return fit < 1 ? 1 : fit > kMostTiles ? kMostTiles : fit;
}

// The block for R rows and N tiles; null where it would not fit the registers.
template <Tile kTile, int R, int N>
constexpr TileFunction block_or_null() {
  if constexpr (R <= kMostRows && N <= tiles_for(R)) {
    return &tile_block<kTile, R, N>;
  } else {
    return nullptr;
  }
}

template <Tile kTile>
TileFunction find_block(int rows, int tiles) {
#define SHOESTRING_ROW(R) \
  {block_or_null<kTile, R, 1>(), block_or_null<kTile, R, 2>(), block_or_null<kTile, R, 3>(), block_or_null<kTile, R, 4>()}
  static const TileFunction kBlocks[20][4] = {
      SHOESTRING_ROW(1), SHOESTRING_ROW(2), SHOESTRING_ROW(3), SHOESTRING_ROW(4),  SHOESTRING_ROW(5),  SHOESTRING_ROW(6),
      SHOESTRING_ROW(7), SHOESTRING_ROW(8), SHOESTRING_ROW(9), SHOESTRING_ROW(10), SHOESTRING_ROW(11), SHOESTRING_ROW(12),
      SHOESTRING_ROW(13), SHOESTRING_ROW(14), SHOESTRING_ROW(15), SHOESTRING_ROW(16), SHOESTRING_ROW(17), SHOESTRING_ROW(18),
      SHOESTRING_ROW(19), SHOESTRING_ROW(20)};
#undef SHOESTRING_ROW
  return kBlocks[rows - 1][tiles - 1];
}

// y[t][16 i + j] for T rows and the tiles from `run.w` on, `outputs` in all (the last tile may be partly used).
template <Tile kTile>
void multiply_tiles(TileRun run, int T, int64_t outputs, bool prefetch_next) {
  // Rows whose activations stay in the second-level cache while the tiles pass by.
  const int64_t resident = (768 << 10) / static_cast<int64_t>(run.x_stride + 1);
  const int most = static_cast<int>(resident < kMostRows ? kMostRows : resident > T ? T : resident);
  const int panels = (T + most - 1) / most;
  const int64_t tiles = (outputs + 15) / 16;
  float last_tile[kMostRows * 16];
  for (int panel = 0; panel < panels; ++panel) {
    const int first_row = static_cast<int>(static_cast<int64_t>(T) * panel / panels);
    const int rows = static_cast<int>(static_cast<int64_t>(T) * (panel + 1) / panels) - first_row;
    const int blocks = rows <= kMostRows ? 1 : (rows + kUsualRows - 1) / kUsualRows;
    const int group = tiles_for((rows + blocks - 1) / blocks);
    for (int64_t tile = 0; tile < tiles;) {
      const bool partial = tile == tiles - 1 && outputs % 16 != 0;
      int64_t count = tiles - tile - (outputs % 16 != 0 && !partial ? 1 : 0);
      count = partial ? 1 : count < group ? count : group;
      TileRun block = run;
      block.w = run.w + tile * run.tile_stride;
      const bool more = prefetch_next && tile + count < tiles;
      const int64_t lines = more ? run.steps * count : 0;
      for (int b = 0; b < blocks; ++b) {
        const int begin = rows * b / blocks, end = rows * (b + 1) / blocks;
        block.x = run.x + (first_row + begin) * run.x_stride;
        block.y = run.y + (first_row + begin) * run.y_stride + 16 * tile;
        block.ahead = block.w + count * run.tile_stride + 64 * (lines * b / blocks);
        block.ahead_lines = lines * (b + 1) / blocks - lines * b / blocks;
        const TileFunction function = find_block<kTile>(end - begin, static_cast<int>(count));
        if (!partial) {
          function(block);
          continue;
        }
        float* y = block.y;
        block.y = last_tile;
        block.y_stride = 16;
        function(block);
        block.y_stride = run.y_stride;
        for (int r = 0; r < end - begin; ++r) {
          for (int i = 0; i < outputs % 16; ++i) y[r * run.y_stride + i] = last_tile[16 * r + i];
        }
      }
      tile += count;
    }
  }
}

template <Tile kTile>
void multiply_bf16_tiles(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
                         int64_t y_stride) {
  const int64_t steps = (w.cols + 1) / 2;
  TileRun run{};
  run.tile_stride = static_cast<size_t>(steps) * 64;
  run.step_stride = 64;
  run.steps = steps;
  run.w = w.data + first / 16 * run.tile_stride;
  run.x = x;
  run.x_stride = x_stride;
  run.y = y + first;
  run.y_stride = y_stride;
  multiply_tiles<kTile>(run, T, last - first, true);
}

// How many rows of weights ahead are fetched to the second-level cache.
constexpr int kRowsAhead = 8;

// Weights row by row: R rows of activations by N rows of weights, sixteen (or thirty-two) inputs at a time.
enum class Row { floats, halves, dots };

template <Row kRow, int R, int N>
inline void row_block(const uint8_t* w, size_t w_stride, const uint8_t* x, size_t x_stride, int64_t cols, float* y,
                      int64_t y_stride) {
  constexpr int kInputs = kRow == Row::dots ? 32 : 16;
  constexpr int kWeightBytes = kRow == Row::floats ? 4 : 2;
  constexpr int kInputBytes = kRow == Row::dots ? 2 : 4;
  F16 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = zero();
  }
  const int64_t whole = cols / kInputs * kInputs;
  for (int64_t k = 0; k < whole; k += kInputs) {
    for (int n = 0; n < N; ++n) {
      const uint8_t* p = w + n * w_stride + k * kWeightBytes;
      prefetch(p + kPrefetchDistance);
      prefetch_far(p + kRowsAhead * w_stride);
    }
#if defined(__AVX512BF16__)
    if constexpr (kRow == Row::dots) {
      Pairs weights[N];
      for (int n = 0; n < N; ++n) weights[n] = load_pairs(w + n * w_stride + k * kWeightBytes);
      for (int r = 0; r < R; ++r) {
        const Pairs values = load_pairs(x + r * x_stride + k * kInputBytes);
        for (int n = 0; n < N; ++n) sums[r][n] = dot_pairs(sums[r][n], weights[n], values);
      }
      continue;
    }
#endif
    F16 weights[N];
    for (int n = 0; n < N; ++n) {
      const uint8_t* p = w + n * w_stride + k * kWeightBytes;
      if constexpr (kRow == Row::floats) {
        weights[n] = load(reinterpret_cast<const float*>(p));
      } else {
        weights[n] = load_bf16(p);
      }
    }
    for (int r = 0; r < R; ++r) {
      const F16 values = load(reinterpret_cast<const float*>(x + r * x_stride + k * kInputBytes));
      for (int n = 0; n < N; ++n) sums[r][n] = fma(weights[n], values, sums[r][n]);
    }
  }
  const auto widened = [](const uint8_t* p, int bytes) {
    uint32_t bits = 0;
    float value;
    if (bytes == 4) {
      std::memcpy(&bits, p, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, p, 2);
      bits = static_cast<uint32_t>(half) << 16;
    }
    std::memcpy(&value, &bits, 4);
    return value;
  };
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      float value = sum(sums[r][n]);
      for (int64_t k = whole; k < cols; ++k) {
        value += widened(w + n * w_stride + k * kWeightBytes, kWeightBytes) *
                 widened(x + r * x_stride + k * kInputBytes, kInputBytes);
      }
      y[r * y_stride + n] = value;
    }
  }
}

template <Row kRow>
void multiply_rows(const Matrix& w, const uint8_t* x, size_t x_stride, int T, int64_t first, int64_t last, float* y,
                   int64_t y_stride) {
  const size_t w_stride = static_cast<size_t>(w.cols) * (kRow == Row::floats ? 4 : 2);
  constexpr int kSide = kAccumulators >= 16 ? 4 : 2;
  const int64_t resident = (768 << 10) / static_cast<int64_t>(x_stride + 1) / kSide * kSide;
  const int panel = static_cast<int>(resident < kSide ? kSide : resident > T ? T : resident);
  for (int begin = 0; begin < T; begin += panel) {
    const int end = begin + panel < T ? begin + panel : T;
    for (int64_t row = first; row < last;) {
      const int count = last - row >= kSide ? kSide : 1;
      const uint8_t* weights = w.data + row * w_stride;
      for (int t = begin; t < end;) {
        const int rows = end - t >= kSide ? kSide : 1;
        const uint8_t* inputs = x + t * x_stride;
        float* out = y + t * y_stride + row;
        if (rows == 1 && count == 1) row_block<kRow, 1, 1>(weights, w_stride, inputs, x_stride, w.cols, out, y_stride);
        if (rows == 1 && count > 1) row_block<kRow, 1, kSide>(weights, w_stride, inputs, x_stride, w.cols, out, y_stride);
        if (rows > 1 && count == 1) row_block<kRow, kSide, 1>(weights, w_stride, inputs, x_stride, w.cols, out, y_stride);
        if (rows > 1 && count > 1) {
          row_block<kRow, kSide, kSide>(weights, w_stride, inputs, x_stride, w.cols, out, y_stride);
        }
        t += rows;
      }
      row += count;
    }
  }
}

}  // namespace
}  // namespace SHOESTRING_ISA
}  // namespace shoestring
