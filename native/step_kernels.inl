// What a step does between its matrix products: norms, activations, attention, the search for the best logits.
#include "vector_math.inl"

namespace shoestring {
namespace SHOESTRING_ISA {
namespace {

inline F16 activate(Activation activation, F16 x) {
  const F16 one = broadcast(1.0f);
  if (activation == Activation::silu) return div(x, add(one, exponential(sub(zero(), x))));
  const F16 cube = mul(mul(x, x), x);
  const F16 inner = mul(broadcast(0.7978845608028654f), fma(broadcast(0.044715f), cube, x));
  return mul(mul(broadcast(0.5f), x), add(one, hyperbolic_tangent(inner)));
}

// Calls body(vector) on sixteen values at a time; the last few go through a buffer filled up with zeros.
template <typename Body>
inline void for_each_pair(const float* a, const float* b, int64_t n, float* out, Body body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, body(load(a + i), load(b + i)));
  if (i < n) {
    float rest[3][16] = {};
    for (int64_t j = i; j < n; ++j) rest[0][j - i] = a[j], rest[1][j - i] = b[j];
    store(rest[2], body(load(rest[0]), load(rest[1])));
    for (int64_t j = i; j < n; ++j) out[j] = rest[2][j - i];
  }
}

void add_to(float* x, const float* y, int64_t n) {
  for_each_pair(x, y, n, x, [](F16 a, F16 b) { return add(a, b); });
}

void scale_by(float* x, float factor, int64_t n) {
  const F16 factors = broadcast(factor);
  for_each_pair(x, x, n, x, [factors](F16 a, F16) { return mul(a, factors); });
}

void gate_with(Activation activation, const float* gate, const float* up, int64_t n, float* out) {
  for_each_pair(gate, up, n, out, [activation](F16 a, F16 b) { return mul(activate(activation, a), b); });
}

void soft_cap(float* x, int64_t n, float cap) {
  const F16 caps = broadcast(cap), inverse = broadcast(1.0f / cap);
  for_each_pair(x, x, n, x, [caps, inverse](F16 a, F16) { return mul(caps, hyperbolic_tangent(mul(a, inverse))); });
}

void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* out) {
  F16 squares = zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F16 values = load(x + i);
    squares = fma(values, values, squares);
  }
  float total = sum(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  const F16 factor = broadcast(1.0f / ::sqrtf(total / static_cast<float>(n) + epsilon));
  for_each_pair(x, weight, n, out, [factor](F16 a, F16 b) { return mul(mul(a, factor), b); });
}

void round_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    out[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
  }
}

// The slots of one step of sixteen that a row sees.
inline uint32_t visible_slots(const AttentionBlock& block, int row, int64_t slot) {
  if (slot >= block.tail) return block.visible[row * block.visible_stride + (slot - block.tail) / 16];
  const int64_t hidden = block.oldest[row] - slot;
  return hidden <= 0 ? 0xFFFFu : hidden >= 16 ? 0 : 0xFFFFu >> hidden << hidden;
}

void attend(const AttentionBlock& block) {
  const int D = block.cache.D;
  const int64_t D16 = round_up(D, 16);
  const int64_t slots = round_up(block.last, 16) - block.first;
  const int queries = block.rows * block.heads;
  const int64_t score_stride = kSplit + 16;  // not a power of two, so that rows do not share cache sets
  const int64_t query_stride = D16 + 16;
  float* scores = block.scratch;                               // [queries][score_stride]
  float* packed = scores + queries * score_stride;             // [queries][query_stride]
  for (int r = 0; r < block.rows; ++r) {
    for (int h = 0; h < block.heads; ++h) {
      std::memcpy(packed + (r * block.heads + h) * query_stride, block.queries + r * block.row_stride + h * D,
                  static_cast<size_t>(D) * sizeof(float));
    }
  }
  TileRun run{};
  run.step_stride = 64;
  run.steps = block.cache.bf16 ? D / 2 : D;
  run.tile_stride = static_cast<size_t>(run.steps) * 64;
  run.w = block.cache.keys + block.first / 16 * run.tile_stride;
  run.x = reinterpret_cast<const uint8_t*>(packed);
  run.x_stride = static_cast<size_t>(query_stride) * sizeof(float);
  run.y = scores;
  run.y_stride = score_stride;
  if (block.cache.bf16) {
    multiply_tiles<Tile::pairs>(run, queries, slots, false);
  } else {
    multiply_tiles<Tile::floats>(run, queries, slots, false);
  }
  // Softmax of each row's visible slots; the others become exact zeros, which leave sums as they are.
  const F16 scale = broadcast(block.scale);
  const F16 lowest = broadcast(-3.0e38f);
  for (int r = 0; r < block.rows; ++r) {
    // Slots [clear, tail) are seen without a look at masks.
    int64_t clear = block.oldest[r] <= block.first ? 0 : round_up(block.oldest[r] - block.first, 16);
    const int64_t tail = block.tail - block.first;
    clear = clear < slots ? clear : slots;
    const int64_t seen = tail < clear ? clear : tail < slots ? tail : slots;
    for (int h = 0; h < block.heads; ++h) {
      float* row = scores + (r * block.heads + h) * score_stride;
      F16 most = lowest;
      const auto scaled = [&](int64_t i) {
        const F16 values = mul(load(row + i), scale);
        if (block.softcap <= 0) return values;
        return mul(broadcast(block.softcap), hyperbolic_tangent(mul(values, broadcast(1.0f / block.softcap))));
      };
      const auto masked = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += 16) {
          const F16 values = select(visible_slots(block, r, block.first + i), scaled(i), lowest);
          most = max(values, most);
          store(row + i, values);
        }
      };
      masked(0, clear);
      for (int64_t i = clear; i < seen; i += 16) {
        const F16 values = scaled(i);
        most = max(values, most);
        store(row + i, values);
      }
      masked(seen, slots);
      const float top = largest(most);
      const F16 tops = broadcast(top);
      WideSum total;
      const auto weigh = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += 16) {
          const uint32_t mask = visible_slots(block, r, block.first + i);
          const F16 weights = select(mask, exponential(sub(load(row + i), tops)), zero());
          total.add(weights);
          store(row + i, weights);
        }
      };
      weigh(0, clear);
      for (int64_t i = clear; i < seen; i += 16) {
        const F16 weights = exponential(sub(load(row + i), tops));
        total.add(weights);
        store(row + i, weights);
      }
      weigh(seen, slots);
      block.largest[r * block.statistics_row_stride + h] = top;
      block.total[r * block.statistics_row_stride + h] = static_cast<float>(total.total());
    }
  }
  run.w = block.cache.values + block.first * D16 * (block.cache.bf16 ? 2 : 4);
  run.tile_stride = 64;
  run.step_stride = static_cast<size_t>(D16) * 4;
  const int64_t used = block.last - block.first;
  run.steps = block.cache.bf16 ? (used + 1) / 2 : used;
  run.x = reinterpret_cast<const uint8_t*>(scores);
  run.x_stride = static_cast<size_t>(score_stride) * sizeof(float);
  run.y = packed;
  run.y_stride = query_stride;
  if (block.cache.bf16) {
    multiply_tiles<Tile::pairs>(run, queries, D16, false);
  } else {
    multiply_tiles<Tile::floats>(run, queries, D16, false);
  }
  for (int r = 0; r < block.rows; ++r) {
    for (int h = 0; h < block.heads; ++h) {
      std::memcpy(block.out + r * block.out_row_stride + h * D16, packed + (r * block.heads + h) * query_stride,
                  static_cast<size_t>(D16) * sizeof(float));
    }
  }
}

void merge(const float* sums, int64_t sum_stride, const float* tops, const float* totals, int64_t statistics_stride,
           int splits, int D, float* out) {
  float top = -3.0e38f;
  for (int s = 0; s < splits; ++s) {
    const float value = tops[s * statistics_stride];
    if (totals[s * statistics_stride] > 0 && value > top) top = value;
  }
  const int64_t D16 = round_up(D, 16);
  F16 results[kMostHeadDimension / 16];
  for (int64_t d = 0; d < D16 / 16; ++d) results[d] = zero();
  float total = 0;
  for (int s = 0; s < splits; ++s) {
    const float part = totals[s * statistics_stride];
    if (part == 0) continue;  // sees none of these slots; what is not a number is passed on
    const float weight = ::expf(tops[s * statistics_stride] - top);
    total += part * weight;
    const F16 weights = broadcast(weight);
    for (int64_t d = 0; d < D16 / 16; ++d) results[d] = fma(load(sums + s * sum_stride + 16 * d), weights, results[d]);
  }
  const F16 factor = broadcast(1.0f / total);
  float rest[16];
  for (int64_t d = 0; d < D16; d += 16) {
    const F16 values = mul(results[d / 16], factor);
    if (d + 16 <= D) {
      store(out + d, values);
      continue;
    }
    store(rest, values);
    for (int64_t i = 0; d + i < D; ++i) out[d + i] = rest[i];
  }
}

void find_best(const float* logits, int64_t n, int32_t first_token, Best* best) {
  // Sixteen columns, each with its own best and the step in which it was found.
  F16 most = broadcast(-INFINITY);
  F16 where = zero();
  uint32_t bad = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F16 values = load(logits + i);
    const uint32_t better = greater(values, most);
    bad |= not_a_number(values);
    most = select(better, values, most);
    where = select(better, broadcast(static_cast<float>(i / 16)), where);
  }
  float values[16], steps[16];
  store(values, most);
  store(steps, where);
  float top = -INFINITY;
  int64_t token = -1;
  for (int lane = 0; lane < 16; ++lane) {
    const int64_t index = static_cast<int64_t>(steps[lane]) * 16 + lane;
    if (values[lane] > top || (values[lane] == top && token >= 0 && index < token)) {
      top = values[lane];
      token = index;
    }
  }
  for (; i < n; ++i) {
    bad |= logits[i] != logits[i];
    if (logits[i] > top) {
      top = logits[i];
      token = i;
    }
  }
  if (bad != 0 || top == INFINITY) best->finite = false;
  if (token < 0) return;
  const int32_t found = first_token + static_cast<int32_t>(token);
  if (best->token < 0 || top > best->value || (top == best->value && found < best->token)) {
    best->value = top;
    best->token = found;
  }
}

float read_all(const float* x, int64_t n) {
  constexpr int kStreams = 4;
  F16 sums[kStreams];
  for (int stream = 0; stream < kStreams; ++stream) sums[stream] = zero();
  const int64_t part = n / kStreams / 16 * 16;
  for (int64_t i = 0; i < part; i += 16) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const float* p = x + stream * part + i;
      prefetch(reinterpret_cast<const uint8_t*>(p) + 1024);
      sums[stream] = add(sums[stream], load(p));
    }
  }
  for (int stream = 1; stream < kStreams; ++stream) sums[0] = add(sums[0], sums[stream]);
  return sum(sums[0]);
}

void top_k(const float* logits, int64_t n, int k, int32_t* tokens) {
  // tokens[0..held) are sorted, best first; ties stay in token order because later ones must be strictly better.
  int held = 0;
  const auto insert = [&](int32_t token) {
    int at = held < k ? held++ : k - 1;
    for (; at > 0 && logits[tokens[at - 1]] < logits[token]; --at) tokens[at] = tokens[at - 1];
    tokens[at] = token;
  };
  for (int64_t i = 0; i < n; i += 16) {
    if (held == k && i + 16 <= n && greater(load(logits + i), broadcast(logits[tokens[k - 1]])) == 0) continue;
    for (int64_t j = i; j < n && j < i + 16; ++j) {
      if (held < k || logits[j] > logits[tokens[k - 1]]) insert(static_cast<int32_t>(j));
    }
  }
  for (; held < k; ++held) tokens[held] = -1;
}

}  // namespace

const VectorKernels& kernels() {
  static const VectorKernels table = [] {
    VectorKernels k{};
    k.f32 = {ActivationFormat::f32, &multiply_rows<Row::floats>, 1};
    k.bf16 = {ActivationFormat::f32, &multiply_rows<Row::halves>, 1};
    k.bf16_tiles = {ActivationFormat::f32, &multiply_bf16_tiles<Tile::pairs>, 16};
#if defined(__AVX512BF16__)
    k.bf16_tiles_dot = {ActivationFormat::bf16, &multiply_bf16_tiles<Tile::dots>, 16};
#endif
    k.round_bf16 = &round_bf16;
    k.rms_norm = &rms_norm;
    k.add = &add_to;
    k.scale = &scale_by;
    k.gate = &gate_with;
    k.soft_cap = &soft_cap;
    k.attend = &attend;
    k.merge = &merge;
    k.find_best = &find_best;
    k.top_k = &top_k;
    k.read_all = &read_all;
    return k;
  }();
  return table;
}

}  // namespace SHOESTRING_ISA
}  // namespace shoestring
