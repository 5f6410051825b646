// Walks down trees of neurons, and the way back, over the vectors of one instruction set.
#include "vector_math.inl"

namespace shoestring {
namespace SHOESTRING_ISA {
namespace {

// Trees or tokens that walk side by side: while one waits for its row, the others work.
constexpr int kLanes = 8;
// Bytes of both children's rows that a lone walk fetches before it knows which it takes (measured: 256 to 1024 are
// alike, none costs a tenth more, whole rows half as much again).
constexpr int64_t kEarly = 512;

inline F16 load_row(const float* p) { return load(p); }
inline F16 load_row(const uint16_t* p) { return load_bf16(reinterpret_cast<const uint8_t*>(p)); }
inline float widen_one(float x) { return x; }
inline float widen_one(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void narrow_one(float x, float* out) { *out = x; }
inline void narrow_one(float x, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  *out = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16 | 0x40) : rounded);
}
inline void store_row(float* p, F16 x) { store(p, x); }
inline void store_row(uint16_t* p, F16 x) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &halves, sizeof halves);
#elif defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
  rounded = _mm512_mask_mov_epi32(rounded, static_cast<__mmask16>(not_a_number(x)), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#else
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) narrow_one(lanes[i], p + i);
#endif
}

// What a walk multiplies rows of weights W by.
template <typename W>
struct InputOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct InputOf<uint16_t> {
  using type = uint16_t;
};
#endif

constexpr int kSums = kAccumulators >= 16 ? 8 : kAccumulators >= 6 ? 4 : 1;

inline float gather(F16 (&sums)[kSums]) {
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] = add(sums[i], sums[i + width]);
  }
  return sum(sums[0]);
}

template <typename W>
inline float dot(const W* w, const float* x, int64_t n) {
  F16 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = zero();
  int64_t c = 0;
  for (; c + 16 * kSums <= n; c += 16 * kSums) {
    for (int i = 0; i < kSums; ++i) sums[i] = fma(load_row(w + c + 16 * i), load(x + c + 16 * i), sums[i]);
  }
  for (; c + 16 <= n; c += 16) sums[0] = fma(load_row(w + c), load(x + c), sums[0]);
  float rest = 0;
  for (; c < n; ++c) rest += widen_one(w[c]) * x[c];
  return gather(sums) + rest;
}

#if defined(__AVX512BF16__)
inline float dot(const uint16_t* w, const uint16_t* x, int64_t n) {
  F16 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = zero();
  const auto bytes = [](const uint16_t* p) { return reinterpret_cast<const uint8_t*>(p); };
  int64_t c = 0;
  for (; c + 32 * kSums <= n; c += 32 * kSums) {
    for (int i = 0; i < kSums; ++i) {
      sums[i] = dot_pairs(sums[i], load_pairs(bytes(w + c + 32 * i)), load_pairs(bytes(x + c + 32 * i)));
    }
  }
  for (; c + 32 <= n; c += 32) sums[0] = dot_pairs(sums[0], load_pairs(bytes(w + c)), load_pairs(bytes(x + c)));
  float rest = 0;
  for (; c < n; ++c) rest += widen_one(w[c]) * widen_one(x[c]);
  return gather(sums) + rest;
}
#endif

// A NaN goes left.
inline int64_t child_of(int64_t node, float z) { return 2 * node + 1 + (z > 0); }

template <bool kFar>
inline void prefetch_row(const void* row, int64_t bytes) {
  const auto* p = static_cast<const uint8_t*>(row);
  for (int64_t i = 0; i < bytes; i += 64) kFar ? prefetch_far(p + i) : prefetch(p + i);
}

// out[n] = start[n] + sum_i factors[i] * rows[i][n], summed in the order of i; `start` may be null.
template <typename W, typename S, typename Out>
inline void combine(const W* const* rows, const float* factors, int64_t count, int64_t n, const S* start, Out* out) {
  int64_t c = 0;
  constexpr int kWide = kAccumulators >= 16 ? 8 : kAccumulators >= 6 ? 4 : 1;
  const auto columns = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    F16 sums[kWidth];
    for (int j = 0; j < kWidth; ++j) sums[j] = start ? load_row(start + c + 16 * j) : zero();
    for (int64_t i = 0; i < count; ++i) {
      const F16 factor = broadcast(factors[i]);
      const W* row = rows[i] + c;
      for (int j = 0; j < kWidth; ++j) sums[j] = fma(load_row(row + 16 * j), factor, sums[j]);
    }
    for (int j = 0; j < kWidth; ++j) store_row(out + c + 16 * j, sums[j]);
    c += 16 * kWidth;
  };
  while (c + 16 * kWide <= n) columns(std::integral_constant<int, kWide>{});
  while (c + 16 <= n) columns(std::integral_constant<int, 1>{});
  for (; c < n; ++c) {
    float sum = start ? widen_one(start[c]) : 0.0f;
    for (int64_t i = 0; i < count; ++i) sum = std::fma(widen_one(rows[i][c]), factors[i], sum);
    narrow_one(sum, out + c);
  }
}

struct Activated {
  F16 value, slope;
};

// f(z) and f'(z). The normal distribution by Abramowitz and Stegun, 7.1.26: absolute error below 2e-7.
inline Activated activated(FastffActivation activation, F16 z) {
  const F16 one = broadcast(1.0f), half = broadcast(0.5f);
  switch (activation) {
    case FastffActivation::relu:
      return {max(zero(), z), select(greater(z, zero()), one, zero())};  // in this order max() hands a NaN on
    case FastffActivation::silu: {
      const F16 s = div(one, add(one, exponential(sub(zero(), z))));
      return {mul(z, s), mul(s, fma(z, sub(one, s), one))};
    }
    case FastffActivation::gelu_tanh: {
      const F16 square = mul(z, z), scale = broadcast(0.7978845608028654f), cubic = broadcast(0.044715f);
      const F16 inner = mul(mul(scale, z), fma(cubic, square, one));
      const F16 t = hyperbolic_tangent(inner), p = mul(half, add(one, t));
      const F16 slope = mul(scale, fma(broadcast(3 * 0.044715f), square, one));
      return {mul(z, p), fma(mul(mul(half, z), fnma(t, t, one)), slope, p)};
    }
    default: {
      const F16 size = max(z, sub(zero(), z));
      const F16 t = div(one, fma(size, broadcast(0.3275911f * 0.70710678f), one));
      F16 p = fma(t, broadcast(1.061405429f), broadcast(-1.453152027f));
      p = fma(p, t, broadcast(1.421413741f));
      p = fma(p, t, broadcast(-0.284496736f));
      p = fma(p, t, broadcast(0.254829592f));
      const F16 bell = exponential(mul(mul(z, z), broadcast(-0.5f)));
      const F16 tail = mul(mul(half, mul(p, t)), bell);
      const F16 below = select(greater(zero(), z), tail, sub(one, tail));
      return {mul(z, below), fma(mul(z, broadcast(0.3989422804f)), bell, below)};
    }
  }
}

// Memory of one thread, kept between calls.
struct Scratch {
  std::vector<float> logits, hidden, inputs;
  std::vector<int32_t> visited;
  std::vector<const void*> rows;
};

inline Scratch& scratch() {
  thread_local Scratch memory;
  return memory;
}

template <typename W>
void walk(const FastffWalk& job, int64_t begin, int64_t end) {
  using X = typename InputOf<W>::type;
  const FastffShape& shape = job.shape;
  const int64_t E = shape.E, O = shape.O, nodes = shape.nodes();
  const int64_t in_bytes = E * static_cast<int64_t>(sizeof(W)), out_bytes = O * static_cast<int64_t>(sizeof(W));
  const int trees = job.last_tree - job.first_tree, levels = shape.depth + 1;
  const int64_t count = static_cast<int64_t>(trees) * levels, padded = (count + 15) / 16 * 16;
  const auto* w_in = reinterpret_cast<const W*>(job.weights.w_in);
  const auto* b_in = reinterpret_cast<const W*>(job.weights.b_in);
  const auto* w_out = reinterpret_cast<const W*>(job.weights.w_out);
  const auto* x = reinterpret_cast<const W*>(job.x);
  const int group = trees >= kLanes ? 1 : kLanes / trees;  // tokens at a time
  const bool ends = job.last == levels;
  const auto token_at = [&](int64_t position) { return job.order ? job.order[position] : position; };

  Scratch& memory = scratch();
  memory.logits.resize(static_cast<size_t>(group * padded));
  memory.visited.resize(static_cast<size_t>(group * padded));
  memory.hidden.resize(static_cast<size_t>(padded));
  memory.rows.resize(static_cast<size_t>(padded));
  if constexpr (!std::is_same_v<W, X>) memory.inputs.resize(static_cast<size_t>(group * E));

  for (int64_t at = begin; at < end; at += group) {
    const int tokens = static_cast<int>(end - at < group ? end - at : group);
    int64_t token[kLanes];
    const X* input[kLanes];
    for (int g = 0; g < tokens; ++g) {
      token[g] = token_at(at + g);
      const W* row = x + token[g] * E;
      if (job.order && at + group + g < end) prefetch_row<true>(x + token_at(at + group + g) * E, in_bytes);
      if constexpr (std::is_same_v<W, X>) {
        input[g] = row;
      } else {
        float* wide = memory.inputs.data() + g * E;
        int64_t c = 0;
        for (; c + 16 <= E; c += 16) store(wide + c, load_row(row + c));
        for (; c < E; ++c) wide[c] = widen_one(row[c]);
        input[g] = wide;
      }
    }
    // Where a lane's way (a token's through one tree) is kept: with the caller, or for the time of the group.
    const auto way_of = [&](int lane) {
      const int g = lane / trees, k = lane % trees;
      return job.visited ? (token[g] * shape.trees + job.first_tree + k) * levels
                         : g * padded + static_cast<int64_t>(k) * levels;
    };
    int32_t* const visited = job.visited ? job.visited : memory.visited.data();
    float* const logits = job.logits ? job.logits : memory.logits.data();

    const int lanes = tokens * trees;
    for (int first_lane = 0; first_lane < lanes; first_lane += kLanes) {
      const int side_by_side = lanes - first_lane < kLanes ? lanes - first_lane : kLanes;
      int64_t base[kLanes], node[kLanes], way[kLanes];
      const X* source[kLanes];
      for (int i = 0; i < side_by_side; ++i) {
        const int lane = first_lane + i;
        base[i] = (job.first_tree + lane % trees) * nodes;
        source[i] = input[lane / trees];
        way[i] = way_of(lane);
        node[i] = job.first > 0 ? child_of(visited[way[i] + job.first - 1], logits[way[i] + job.first - 1]) : 0;
      }
      // A lone walk looks a little into both children, so that the memory is not idle during the dot product; the rest
      // of the right one follows. Whole rows of both would be half in vain, and few rows are all that a core can fetch.
      const int64_t early = side_by_side > 1 ? 0 : kEarly < in_bytes ? kEarly : in_bytes;
      for (int level = job.first; level < job.last; ++level) {
        const bool ahead = level + 1 < job.last && level + 1 >= job.prefetch_from;
        for (int i = 0; i < side_by_side; ++i) {
          const int64_t here = base[i] + node[i], left = base[i] + 2 * node[i] + 1;
          if (ahead && early > 0) {
            prefetch_row<false>(w_in + left * E, early);
            prefetch_row<false>(w_in + (left + 1) * E, early);
          }
          float z = dot(w_in + here * E, source[i], E);
          if (b_in) z += widen_one(b_in[here]);
          visited[way[i] + level] = static_cast<int32_t>(node[i]);
          logits[way[i] + level] = z;
          node[i] = child_of(node[i], z);
          if (ahead) {
            prefetch_row<false>(reinterpret_cast<const uint8_t*>(w_in + (base[i] + node[i]) * E) + early, in_bytes - early);
          }
          if (level >= job.prefetch_from) prefetch_row<true>(w_out + here * O, out_bytes);
        }
      }
    }
    if (!ends) continue;
    for (int g = 0; g < tokens; ++g) {
      const int64_t way = way_of(g * trees);
      const auto** const rows = reinterpret_cast<const W**>(memory.rows.data());
      float* const hidden = memory.hidden.data();
      std::memcpy(hidden, logits + way, static_cast<size_t>(count) * sizeof(float));
      for (int64_t i = 0; i < padded; i += 16) store(hidden + i, activated(shape.activation, load(hidden + i)).value);
      for (int k = 0, i = 0; k < trees; ++k) {
        const W* tree = w_out + (job.first_tree + k) * nodes * O;
        for (int level = 0; level < levels; ++level, ++i) rows[i] = tree + visited[way + i] * O;
      }
      float* sums = job.sums ? job.sums + token[g] * O : nullptr;
      const auto add_to = [&](const auto* start) {
        if (job.y) {
          combine(rows, hidden, count, O, start, reinterpret_cast<W*>(job.y) + token[g] * O);
        } else {
          combine(rows, hidden, count, O, start, sums);
        }
      };
      if (job.first_tree > 0) {
        add_to(static_cast<const float*>(sums));
      } else {
        add_to(job.residual ? reinterpret_cast<const W*>(job.residual) + token[g] * O : nullptr);
      }
    }
  }
}

void backward_tokens(const FastffBackward& job, int64_t begin, int64_t end) {
  const FastffShape& shape = job.shape;
  const int64_t E = shape.E, O = shape.O, nodes = shape.nodes(), active = shape.active();
  const int64_t padded = (active + 15) / 16 * 16;
  const auto* w_in = reinterpret_cast<const float*>(job.weights.w_in);
  const auto* w_out = reinterpret_cast<const float*>(job.weights.w_out);
  Scratch& memory = scratch();
  memory.logits.resize(static_cast<size_t>(2 * padded));
  memory.hidden.resize(static_cast<size_t>(padded));
  memory.rows.resize(static_cast<size_t>(active));
  float *const z = memory.logits.data(), *const slope = z + padded, *const hidden = memory.hidden.data();
  const float** const rows = reinterpret_cast<const float**>(memory.rows.data());
  for (int64_t t = begin; t < end; ++t) {
    std::memcpy(z, job.logits + t * active, static_cast<size_t>(active) * sizeof(float));
    for (int64_t i = 0; i < padded; i += 16) {
      const Activated both = activated(shape.activation, load(z + i));
      store(hidden + i, both.value);
      store(slope + i, both.slope);
    }
    float* grad_z = job.grad_z + t * active;
    for (int64_t i = 0; i < active; ++i) {
      const int64_t node = i / (shape.depth + 1) * nodes + job.visited[t * active + i];
      rows[i] = w_in + node * E;
      grad_z[i] = dot(w_out + node * O, job.grad_y + t * O, O) * slope[i];
    }
    std::memcpy(job.hidden + t * active, hidden, static_cast<size_t>(active) * sizeof(float));
    if (job.grad_x) combine(rows, grad_z, active, E, static_cast<const float*>(nullptr), job.grad_x + t * E);
  }
}

void backward_node(const FastffBackward& job, int64_t node, int64_t first, int64_t last) {
  const int64_t E = job.shape.E, O = job.shape.O, active = job.shape.active();
  const int64_t begin = job.starts[node], count = job.starts[node + 1] - begin;
  Scratch& memory = scratch();
  memory.hidden.resize(static_cast<size_t>(count));
  memory.rows.resize(static_cast<size_t>(count));
  const float** const rows = reinterpret_cast<const float**>(memory.rows.data());
  float* const factors = memory.hidden.data();
  const auto gradient = [&](const float* factor, const float* inputs, int64_t width, float* out) {
    const int64_t stop = last < width ? last : width;
    if (first >= stop) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t visit = job.visits[begin + i];
      factors[i] = factor[visit];
      rows[i] = inputs + visit / active * width + first;
    }
    combine(rows, factors, count, stop - first, static_cast<const float*>(nullptr), out + node * width + first);
  };
  gradient(job.hidden, job.grad_y, O, job.grad_w_out);
  gradient(job.grad_z, job.x, E, job.grad_w_in);
  if (job.grad_b_in && first == 0) {
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += job.grad_z[job.visits[begin + i]];
    job.grad_b_in[node] = total;
  }
}

}  // namespace

const FastffKernels& fastff_kernels() {
  static const FastffKernels kernels = {&walk<float>, &walk<uint16_t>, &backward_tokens, &backward_node};
  return kernels;
}

}  // namespace SHOESTRING_ISA
}  // namespace shoestring
