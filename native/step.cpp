// One forward pass of all layers over the packed rows of several token trees.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>

#include "model.hpp"

namespace shoestring {
namespace {

// Queries (rows times heads of a group) that go through attention together, at most.
constexpr int kQueries = 48;
// Up to here, work on whole rows is so little that handing it round costs more than it saves.
constexpr int kFewRows = 3;
static_assert(kQueries <= kMostQueries, "the scratch memory must hold them");

// Which of a segment's rows see which of its slots, from slot `tail` on, for one sliding window.
struct Visibility {
  int window;
  int64_t stride;
  std::vector<uint16_t> masks;  // [rows][stride]
  std::vector<int64_t> oldest;  // [rows]
};

struct SegmentPlan {
  Segment segment;
  int first_row;
  int64_t tail;
  std::vector<int> depths;
  std::vector<Visibility> visibility;  // one per distinct window of the model

  const Visibility& of_window(int window) const {
    for (const Visibility& v : visibility) {
      if (v.window == window) return v;
    }
    return visibility.front();
  }
};

// Attention of some rows of a segment, one key-value head, over splits [first_split, last_split).
struct AttentionItem {
  int segment;
  int kv_head;
  int first_row, rows;    // within the segment
  int first_head, heads;  // within the group
  int first_split, last_split;
  bool whole;  // covers all splits: finished at once, without the buffers that are merged later
};

Visibility see(const SegmentPlan& plan, const int32_t* parents, int window) {
  const int rows = plan.segment.rows;
  const int64_t n = plan.segment.cached;
  Visibility v;
  v.window = window;
  v.stride = (n - plan.tail + rows + 15) / 16;
  v.masks.assign(static_cast<size_t>(rows * v.stride), 0);
  v.oldest.assign(static_cast<size_t>(rows), 0);
  for (int row = 0; row < rows; ++row) {
    uint16_t* masks = v.masks.data() + row * v.stride;
    const auto show = [&](int64_t slot) {
      masks[(slot - plan.tail) / 16] |= static_cast<uint16_t>(1u << ((slot - plan.tail) % 16));
    };
    const int64_t position = n + plan.depths[static_cast<size_t>(row)];
    const int64_t oldest = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
    v.oldest[static_cast<size_t>(row)] = oldest;
    for (int64_t slot = std::max(plan.tail, oldest); slot < n; ++slot) show(slot);
    for (int ancestor = row; ancestor >= 0; ancestor = parents[ancestor]) {
      if (n + plan.depths[static_cast<size_t>(ancestor)] < oldest) break;
      show(n + ancestor);
    }
  }
  return v;
}

class Step : public Job {
 public:
  Step(std::shared_ptr<Model> model, StepInput input);
  void work(int thread) override;
  // Copies: a late worker may still be looking at what the phases were.
  StepOutput output() const;

 private:
  struct Product {
    const Linear* linear;
    float* y;
    int64_t y_stride;
  };

  static int phases(const Model& model) { return 12 * static_cast<int>(model.layers.size()) + 8; }

  void plan_attention();
  void reserve();

  // Phases' bodies; rows are packed rows.
  void embed(int64_t begin, int64_t end);
  void rotate_and_write(const Layer& layer, int index, int64_t begin, int64_t end);
  void attend(const Layer& layer, int index, const AttentionItem& item, int thread);
  void merge(int64_t begin, int64_t end, int thread);
  // Products, and then `rows(begin, end)` over all rows: by the thread that finishes last where they are few.
  template <typename Rows>
  void products(Walk& walk, std::initializer_list<Product> list, const PreparedRows& in, Rows&& rows);
  template <typename Body, typename Rows>
  void phase_with_rows(Walk& walk, int64_t total, int64_t grain, Body&& body, Rows&& rows);
  void multiply(const Linear& linear, const PreparedRows& in, int rows, int64_t first, int64_t last, float* y, int64_t y_stride);
  void gate_and_up(Walk& walk, const Layer& layer);
  void run_head(Walk& walk, int thread);
  void keep_hidden(int layer, int64_t begin, int64_t end);

  // Normalises (or takes as it is, if `norm` is empty) and prepares one row.
  void normalise_and_prepare(const float* x, const std::vector<float>& norm, const PreparedRows& to, int64_t to_row, int64_t n,
                             float* scratch);
  void add_branch(const std::vector<float>& norm, int64_t row, float* scratch);
  void rotate(float* heads, int count, const float* angles) const;

  float* scratch(int thread) const { return m.scratch.floats() + thread * scratch_floats_; }
  int64_t grain() const { return T_ <= kFewRows || T_ > 12 ? 1 : 2; }

  std::shared_ptr<Model> model_;
  Model& m;
  const ModelShape s;
  const VectorKernels& kernels;
  StepInput in_;
  int T_ = 0, W_ = 0;
  int threads_;
  std::vector<SegmentPlan> plans_;
  std::vector<int> segment_of_, position_of_;  // per row
  std::vector<int32_t> embedding_of_;          // per row, -1: by its token
  std::vector<AttentionItem> items_;
  int most_splits_ = 1;
  bool merging_ = false;
  int64_t scratch_floats_ = 0;
  int64_t head_piece_ = 0;
  std::vector<Best> best_;  // [threads][W]
  std::vector<int32_t> top_k_;
  std::vector<std::shared_ptr<float>> hidden_;
};

Step::Step(std::shared_ptr<Model> model, StepInput input)
    : Job(phases(*model)),
      model_(std::move(model)),
      m(*model_),
      s(m.shape),
      kernels(vector_kernels(m.isa)),
      in_(std::move(input)),
      threads_(m.pool->threads()) {
  for (const Segment& segment : in_.segments) {
    SegmentPlan plan;
    plan.segment = segment;
    plan.first_row = T_;
    plan.tail = segment.cached / 16 * 16;
    T_ += segment.rows;
    if (static_cast<size_t>(T_) > in_.parents.size() || segment.rows <= 0) {
      throw std::invalid_argument("a step's rows do not fit its segments");
    }
    const int32_t* parents = in_.parents.data() + plan.first_row;
    for (int row = 0; row < segment.rows; ++row) {
      if (parents[row] >= row || (row == 0) != (parents[row] < 0)) throw std::invalid_argument("a parent is an earlier row");
      plan.depths.push_back(row == 0 ? 0 : plan.depths[static_cast<size_t>(parents[row])] + 1);
      segment_of_.push_back(static_cast<int>(plans_.size()));
      position_of_.push_back(static_cast<int>(segment.cached) + plan.depths.back());
    }
    for (const Layer& layer : m.layers) {
      bool known = false;
      for (const Visibility& v : plan.visibility) known = known || v.window == layer.window;
      if (!known) plan.visibility.push_back(see(plan, parents, layer.window));
    }
    plans_.push_back(std::move(plan));
  }
  if (T_ == 0 || in_.tokens.size() != static_cast<size_t>(T_) || in_.parents.size() != static_cast<size_t>(T_)) {
    throw std::invalid_argument("a step needs rows, and a token and a parent for each");
  }
  embedding_of_.assign(static_cast<size_t>(T_), -1);
  for (size_t i = 0; i < in_.embedding_rows.size(); ++i) {
    embedding_of_.at(static_cast<size_t>(in_.embedding_rows[i])) = static_cast<int32_t>(i);
  }
  for (int row = 0; row < T_; ++row) {
    const int32_t token = in_.tokens[static_cast<size_t>(row)];
    if (embedding_of_[static_cast<size_t>(row)] < 0 && (token < 0 || token >= s.V)) {
      throw std::invalid_argument("token " + std::to_string(token) + " is not in the vocabulary");
    }
  }
  for (const int32_t row : in_.wanted) {
    if (row < 0 || row >= T_) throw std::invalid_argument("a wanted row is not in the step");
  }
  W_ = static_cast<int>(in_.wanted.size());
  in_.top_k = std::min(in_.top_k, s.V);
  if (in_.top_k > 0) in_.keep_logits = true;
  plan_attention();
  reserve();
}

void Step::plan_attention() {
  const int group = s.H / s.K;
  const int heads = std::min(group, kQueries);
  for (size_t p = 0; p < plans_.size(); ++p) {
    const Segment& segment = plans_[p].segment;
    const int splits = static_cast<int>((segment.cached + segment.rows + kSplit - 1) / kSplit);
    // Blocks of rows share keys and values in the first-level cache; enough of them to occupy all threads.
    int rows = std::max(1, kQueries / heads);
    while (rows > 4 && s.K * ((segment.rows + rows - 1) / rows) < 4 * threads_) rows = (rows + 1) / 2;
    const int blocks = (segment.rows + rows - 1) / rows;
    const bool whole = splits == 1 || s.K * blocks >= 3 * threads_;
    for (int block = 0; block < blocks; ++block) {
      const int begin = block * rows, count = std::min(rows, segment.rows - begin);
      // The block's last row sees no slot beyond its own.
      const int seen = static_cast<int>((segment.cached + begin + count + kSplit - 1) / kSplit);
      for (int k = 0; k < s.K; ++k) {
        for (int h = 0; h < group; h += heads) {
          AttentionItem item{static_cast<int>(p), k, begin, count, h, std::min(heads, group - h), 0, seen, true};
          if (whole) {
            items_.push_back(item);
            continue;
          }
          item.whole = false;
          merging_ = true;
          for (int split = 0; split < seen; ++split) {
            item.first_split = split;
            item.last_split = split + 1;
            items_.push_back(item);
          }
        }
      }
    }
    most_splits_ = std::max(most_splits_, splits);
  }
}

void Step::reserve() {
  const int64_t T = T_;
  const int64_t floats = sizeof(float);
  const int64_t rows = std::max<int64_t>(T, W_);
  m.inputs.reserve(rows);
  m.attended.reserve(T);
  m.gated.reserve(T);
  m.x.reserve(T * s.E * floats);
  m.branch.reserve(T * s.E * floats);
  m.qkv.reserve(T * (s.H + 2 * s.K) * s.D * floats);
  m.gate.reserve(T * s.F * floats);
  m.up.reserve(T * s.F * floats);
  m.angles.reserve(std::max<int64_t>(1, static_cast<int64_t>(m.ropes.size())) * T * s.D * floats);
  if (merging_) {
    m.partial_sums.reserve(most_splits_ * T * s.H * round_up(s.D, 16) * floats);
    m.partial_statistics.reserve(2 * most_splits_ * T * s.H * floats);
  }
  head_piece_ = std::clamp<int64_t>((int64_t{1} << 16) / std::max(1, W_) / 48 * 48, 48, 1008);
  const int64_t attention = attention_scratch(s.D) + most_splits_ * kMostQueries * (round_up(s.D, 16) + 2);
  const int64_t row = std::max<int64_t>({s.E, s.F, static_cast<int64_t>(s.H) * s.D}) + 64;
  scratch_floats_ = round_up(std::max({attention, 2 * row, W_ * head_piece_}), 64);
  m.scratch.reserve(threads_ * scratch_floats_ * floats);
  best_.assign(static_cast<size_t>(threads_) * W_, Best{-INFINITY, -1, true});
  top_k_.assign(static_cast<size_t>(W_) * in_.top_k, -1);
  if (in_.keep_logits) {
    const int64_t bytes = static_cast<int64_t>(W_) * s.V * floats;
    if (m.logits_capacity < bytes || m.logits.use_count() > 1) {
      // The last step's logits are still looked at, or too few.
      m.logits = std::shared_ptr<float>(nullptr);
      const std::shared_ptr<uint8_t> memory = allocate(bytes);
      m.logits = std::shared_ptr<float>(memory, reinterpret_cast<float*>(memory.get()));
      m.logits_capacity = bytes;
    }
  }
  for (size_t i = 0; i < in_.hidden_layers.size(); ++i) {
    const std::shared_ptr<uint8_t> memory = allocate(T * s.E * floats);
    hidden_.push_back(std::shared_ptr<float>(memory, reinterpret_cast<float*>(memory.get())));
  }
}

void Step::work(int thread) {
  Walk walk(*this, threads_);
  const int layers = static_cast<int>(m.layers.size());
  const int64_t width = static_cast<int64_t>(s.H + 2 * s.K) * s.D;
  const int64_t T = T_;
  walk.phase(T, 1, [&](int64_t begin, int64_t end) {
    embed(begin, end);
    for (int64_t t = begin; t < end; ++t) {
      normalise_and_prepare(m.x.floats() + t * s.E, m.layers[0].attention_norm, m.inputs, t, s.E, scratch(thread));
    }
  });
  for (int index = 0; index < layers; ++index) {
    const Layer& layer = m.layers[static_cast<size_t>(index)];
    float* qkv = m.qkv.floats();
    products(walk,
             {{&layer.q, qkv, width}, {&layer.k, qkv + s.H * s.D, width}, {&layer.v, qkv + (s.H + s.K) * s.D, width}},
             m.inputs, [&](int64_t begin, int64_t end) { rotate_and_write(layer, index, begin, end); });
    phase_with_rows(
        walk, static_cast<int64_t>(items_.size()), 1,
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) attend(layer, index, items_[static_cast<size_t>(i)], thread);
        },
        [&](int64_t begin, int64_t end) { merge(begin, end, thread); });
    products(walk, {{&layer.o, m.branch.floats(), s.E}}, m.attended, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        add_branch(layer.post_attention_norm, t, scratch(thread));
        normalise_and_prepare(m.x.floats() + t * s.E, layer.mlp_norm, m.inputs, t, s.E, scratch(thread));
      }
    });
    gate_and_up(walk, layer);
    products(walk, {{&layer.down, m.branch.floats(), s.E}}, m.gated, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        add_branch(layer.post_mlp_norm, t, scratch(thread));
        if (index + 1 < layers) {
          const std::vector<float>& norm = m.layers[static_cast<size_t>(index) + 1].attention_norm;
          normalise_and_prepare(m.x.floats() + t * s.E, norm, m.inputs, t, s.E, scratch(thread));
        }
      }
      if (index + 1 < layers) keep_hidden(index + 1, begin, end);
    });
  }
  if (!in_.hidden_layers.empty()) {
    walk.phase(T, 1, [&](int64_t begin, int64_t end) { keep_hidden(layers, begin, end); });
  }
  run_head(walk, thread);
}

void Step::embed(int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    float* x = m.x.floats() + t * s.E;
    const int32_t own = embedding_of_[static_cast<size_t>(t)];
    if (own >= 0) {
      std::memcpy(x, in_.embeddings.data() + static_cast<int64_t>(own) * s.E, static_cast<size_t>(s.E) * sizeof(float));
    } else {
      dequantize_row(m.embedding, in_.tokens[static_cast<size_t>(t)], x);
      if (s.embedding_scale != 1) kernels.scale(x, s.embedding_scale, s.E);
    }
    for (size_t r = 0; r < m.ropes.size(); ++r) {
      const Rope& rope = m.ropes[r];
      float* angles = m.angles.floats() + (static_cast<int64_t>(r) * T_ + t) * s.D;  // D/2 cosines, D/2 sines
      for (int i = 0; i < s.D / 2; ++i) {
        const float angle = static_cast<float>(position_of_[static_cast<size_t>(t)]) * rope.inverse_frequencies[static_cast<size_t>(i)];
        angles[i] = std::cos(angle) * rope.scaling;
        angles[s.D / 2 + i] = std::sin(angle) * rope.scaling;
      }
    }
  }
  keep_hidden(0, begin, end);
}

void Step::keep_hidden(int layer, int64_t begin, int64_t end) {
  for (size_t i = 0; i < hidden_.size(); ++i) {
    if (in_.hidden_layers[i] != layer) continue;
    float* out = hidden_[i].get();
    for (int64_t t = begin; t < end; ++t) {
      const float* x = m.x.floats() + t * s.E;
      if (layer == static_cast<int>(m.layers.size())) {  // as in transformers, the last one comes after the final norm
        kernels.rms_norm(x, m.final_norm.data(), s.E, s.epsilon, out + t * s.E);
      } else {
        std::memcpy(out + t * s.E, x, static_cast<size_t>(s.E) * sizeof(float));
      }
    }
  }
}

void Step::normalise_and_prepare(const float* x, const std::vector<float>& norm, const PreparedRows& to, int64_t to_row, int64_t n,
                                 float* scratch) {
  const bool floats = to.has(ActivationFormat::f32);
  float* row = floats ? reinterpret_cast<float*>(to.row(ActivationFormat::f32, to_row)) : scratch;
  if (!norm.empty()) {
    kernels.rms_norm(x, norm.data(), n, s.epsilon, row);
  } else if (floats && row != x) {
    std::memcpy(row, x, static_cast<size_t>(n) * sizeof(float));
  } else if (!floats) {
    row = const_cast<float*>(x);
  }
  for (const ActivationFormat format : {ActivationFormat::bf16, ActivationFormat::int8_blocks}) {
    if (to.has(format)) prepare_row(format, m.isa, row, n, to.row(format, to_row));
  }
}

void Step::add_branch(const std::vector<float>& norm, int64_t row, float* scratch) {
  const float* branch = m.branch.floats() + row * s.E;
  if (!norm.empty()) {
    kernels.rms_norm(branch, norm.data(), s.E, s.epsilon, scratch);
    branch = scratch;
  }
  kernels.add(m.x.floats() + row * s.E, branch, s.E);
}

void Step::multiply(const Linear& linear, const PreparedRows& in, int rows, int64_t first, int64_t last, float* y,
                    int64_t y_stride) {
  const ActivationFormat format = linear.kernel->activations;
  linear.kernel->multiply(linear.matrix, in.row(format, 0), in.stride[static_cast<int>(format)], rows, first, last, y,
                          y_stride);
  if (linear.bias.empty()) return;
  for (int t = 0; t < rows; ++t) kernels.add(y + t * y_stride + first, linear.bias.data() + first, last - first);
}

template <typename Body, typename Rows>
void Step::phase_with_rows(Walk& walk, int64_t total, int64_t grain, Body&& body, Rows&& rows) {
  if (T_ <= kFewRows) {
    walk.phase(total, grain, body, [&] { rows(0, T_); });
  } else {
    walk.phase(total, grain, body);
    walk.phase(T_, 1, rows);
  }
}

// The products' outputs, sixteen to a unit, are one range of work.
template <typename Rows>
void Step::products(Walk& walk, std::initializer_list<Product> list, const PreparedRows& in, Rows&& rows) {
  int64_t total = 0;
  for (const Product& product : list) total += (product.linear->matrix.rows + 15) / 16;
  const auto body = [&](int64_t begin, int64_t end) {
    int64_t unit = 0;
    for (const Product& product : list) {
      const int64_t outputs = product.linear->matrix.rows, units = (outputs + 15) / 16;
      const int64_t first = std::max(begin - unit, int64_t{0}) * 16;
      const int64_t last = std::min((end - unit) * 16, outputs);
      if (first < last) multiply(*product.linear, in, T_, first, last, product.y, product.y_stride);
      unit += units;
    }
  };
  phase_with_rows(walk, total, grain(), body, rows);
}

void Step::gate_and_up(Walk& walk, const Layer& layer) {
  float *gate = m.gate.floats(), *up = m.up.floats();
  const bool blocks = m.gated.has(ActivationFormat::int8_blocks);
  const auto body = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 16, last = std::min<int64_t>(end * 16, s.F);
    multiply(layer.gate, m.inputs, T_, first, last, gate, s.F);
    multiply(layer.up, m.inputs, T_, first, last, up, s.F);
    for (int t = 0; t < T_; ++t) {
      float* row = gate + static_cast<int64_t>(t) * s.F;
      float* out = m.gated.has(ActivationFormat::f32) && !blocks
                       ? reinterpret_cast<float*>(m.gated.row(ActivationFormat::f32, t))
                       : row;
      kernels.gate(s.activation, row + first, up + static_cast<int64_t>(t) * s.F + first, last - first, out + first);
      if (!blocks && m.gated.has(ActivationFormat::bf16)) {
        kernels.round_bf16(out + first, last - first,
                           reinterpret_cast<uint16_t*>(m.gated.row(ActivationFormat::bf16, t)) + first);
      }
    }
  };
  if (!blocks) {
    walk.phase((s.F + 15) / 16, grain(), body);
    return;
  }
  // Blocks of inputs share a scale: they are prepared when all of a row is there.
  phase_with_rows(walk, (s.F + 15) / 16, grain(), body, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) normalise_and_prepare(gate + t * s.F, {}, m.gated, t, s.F, nullptr);
  });
}

void Step::rotate(float* heads, int count, const float* angles) const {
  const int half = s.D / 2;
  const float *cosines = angles, *sines = angles + half;
  for (int h = 0; h < count; ++h, heads += s.D) {
    if (s.adjacent_pairs) {
      for (int i = 0; i < half; ++i) {
        const float a = heads[2 * i], b = heads[2 * i + 1];
        heads[2 * i] = a * cosines[i] - b * sines[i];
        heads[2 * i + 1] = b * cosines[i] + a * sines[i];
      }
    } else {
      for (int i = 0; i < half; ++i) {
        const float a = heads[i], b = heads[half + i];
        heads[i] = a * cosines[i] - b * sines[i];
        heads[half + i] = b * cosines[i] + a * sines[i];
      }
    }
  }
}

void Step::rotate_and_write(const Layer& layer, int index, int64_t begin, int64_t end) {
  const int64_t width = static_cast<int64_t>(s.H + 2 * s.K) * s.D;
  for (int64_t t = begin; t < end; ++t) {
    float* q = m.qkv.floats() + t * width;
    float* k = q + static_cast<int64_t>(s.H) * s.D;
    const float* v = k + static_cast<int64_t>(s.K) * s.D;
    if (!layer.q_norm.empty()) {
      for (int h = 0; h < s.H; ++h) kernels.rms_norm(q + h * s.D, layer.q_norm.data(), s.D, s.epsilon, q + h * s.D);
    }
    if (!layer.k_norm.empty()) {
      for (int h = 0; h < s.K; ++h) kernels.rms_norm(k + h * s.D, layer.k_norm.data(), s.D, s.epsilon, k + h * s.D);
    }
    if (layer.rope >= 0) {
      const float* angles = m.angles.floats() + (static_cast<int64_t>(layer.rope) * T_ + t) * s.D;
      rotate(q, s.H, angles);
      rotate(k, s.K, angles);
    }
    const SegmentPlan& plan = plans_[static_cast<size_t>(segment_of_[static_cast<size_t>(t)])];
    const int64_t slot = plan.segment.cached + (t - plan.first_row);
    for (int h = 0; h < s.K; ++h) {
      const HeadCache cache = plan.segment.storage->head(index, h);
      KvStorage::write(cache, slot, k + h * s.D, v + h * s.D, kernels);
      if (t - plan.first_row == plan.segment.rows - 1 && slot % 2 == 0) KvStorage::clear_value(cache, slot + 1);
    }
  }
}

void Step::attend(const Layer& layer, int index, const AttentionItem& item, int thread) {
  const SegmentPlan& plan = plans_[static_cast<size_t>(item.segment)];
  const Visibility& visible = plan.of_window(layer.window);
  const int64_t D16 = round_up(s.D, 16);
  const int64_t width = static_cast<int64_t>(s.H + 2 * s.K) * s.D;
  const int64_t row = plan.first_row + item.first_row;
  const int head = item.kv_head * (s.H / s.K) + item.first_head;
  const int queries = item.rows * item.heads;
  AttentionBlock block{};
  block.cache = plan.segment.storage->head(index, item.kv_head);
  block.queries = m.qkv.floats() + row * width + static_cast<int64_t>(head) * s.D;
  block.row_stride = width;
  block.rows = item.rows;
  block.heads = item.heads;
  block.tail = plan.tail;
  block.visible = visible.masks.data() + item.first_row * visible.stride;
  block.visible_stride = visible.stride;
  block.oldest = visible.oldest.data() + item.first_row;
  block.scale = s.attention_scale;
  block.softcap = s.attention_softcap;
  block.scratch = scratch(thread);
  // Whole items keep their splits' sums in scratch memory, [splits][rows][heads]; others in buffers over all rows.
  float* sums = block.scratch + attention_scratch(s.D);
  const int splits = item.last_split - item.first_split;
  float* statistics = sums + static_cast<int64_t>(splits) * queries * D16;
  const int64_t end = plan.segment.cached + item.first_row + item.rows;
  int64_t oldest = block.oldest[0];
  for (int r = 1; r < item.rows; ++r) oldest = std::min(oldest, block.oldest[r]);
  oldest = std::min(oldest, plan.tail);
  for (int split = item.first_split; split < item.last_split; ++split) {
    float* largest;
    float* total;
    if (item.whole) {
      block.out = sums + static_cast<int64_t>(split) * queries * D16;
      block.out_row_stride = item.heads * D16;
      block.statistics_row_stride = item.heads;
      largest = statistics + static_cast<int64_t>(split) * queries;
      total = largest + static_cast<int64_t>(splits) * queries;
    } else {
      const int64_t at = (static_cast<int64_t>(split) * T_ + row) * s.H + head;
      block.out = m.partial_sums.floats() + at * D16;
      block.out_row_stride = s.H * D16;
      block.statistics_row_stride = s.H;
      largest = m.partial_statistics.floats() + at;
      total = largest + static_cast<int64_t>(most_splits_) * T_ * s.H;
    }
    block.largest = largest;
    block.total = total;
    // What no row sees is not read; the sums begin at whole tiles.
    block.first = std::max(split * kSplit, oldest / 16 * 16);
    block.last = std::min((split + 1) * kSplit, end);
    if (block.first < block.last) {
      kernels.attend(block);
      continue;
    }
    for (int r = 0; r < item.rows; ++r) {
      for (int h = 0; h < item.heads; ++h) total[r * block.statistics_row_stride + h] = 0;
    }
  }
  if (!item.whole) return;
  for (int r = 0; r < item.rows; ++r) {
    for (int h = 0; h < item.heads; ++h) {
      // The queries are no longer needed: their place takes the result.
      const int64_t at = static_cast<int64_t>(r) * item.heads + h;
      kernels.merge(sums + at * D16, queries * D16, statistics + at, statistics + at + static_cast<int64_t>(splits) * queries,
                    queries, splits, s.D, m.qkv.floats() + (row + r) * width + static_cast<int64_t>(head + h) * s.D);
    }
  }
}

void Step::merge(int64_t begin, int64_t end, int thread) {
  const int64_t width = static_cast<int64_t>(s.H + 2 * s.K) * s.D, D16 = round_up(s.D, 16);
  const int64_t totals = static_cast<int64_t>(most_splits_) * T_ * s.H;
  for (int64_t t = begin; t < end; ++t) {
    float* row = m.qkv.floats() + t * width;
    const SegmentPlan& plan = plans_[static_cast<size_t>(segment_of_[static_cast<size_t>(t)])];
    // Find how this row's segment was attended: all its items are alike.
    bool whole = true;
    for (const AttentionItem& item : items_) {
      if (item.segment == segment_of_[static_cast<size_t>(t)]) {
        whole = item.whole;
        break;
      }
    }
    if (!whole) {
      const int64_t last = plan.segment.cached + (t - plan.first_row);
      const int splits = static_cast<int>(last / kSplit) + 1;
      for (int h = 0; h < s.H; ++h) {
        const int64_t at = t * s.H + h;
        const float* statistics = m.partial_statistics.floats() + at;
        kernels.merge(m.partial_sums.floats() + at * D16, static_cast<int64_t>(T_) * s.H * D16, statistics,
                      statistics + totals, static_cast<int64_t>(T_) * s.H, splits, s.D, row + h * s.D);
      }
    }
    normalise_and_prepare(row, {}, m.attended, t, static_cast<int64_t>(s.H) * s.D, scratch(thread));
  }
}

void Step::run_head(Walk& walk, int thread) {
  if (W_ == 0) return;
  walk.phase(W_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const int64_t row = in_.wanted[static_cast<size_t>(w)];
      normalise_and_prepare(m.x.floats() + row * s.E, m.final_norm, m.inputs, w, s.E, scratch(thread));
    }
  });
  const int64_t V = s.V;
  walk.phase((V + 15) / 16, grain(), [&](int64_t begin, int64_t end) {
    const int64_t limit = std::min(end * 16, V);
    for (int64_t first = begin * 16; first < limit; first += head_piece_) {
      const int64_t last = std::min(first + head_piece_, limit), count = last - first;
      // Logits that nobody asked for live only until their best is known.
      float* y = in_.keep_logits ? m.logits.get() : scratch(thread) - first;
      const int64_t stride = in_.keep_logits ? V : head_piece_;
      multiply(m.head, m.inputs, W_, first, last, y, stride);
      for (int w = 0; w < W_; ++w) {
        float* logits = y + w * stride + first;
        if (s.logit_softcap > 0) kernels.soft_cap(logits, count, s.logit_softcap);
        kernels.find_best(logits, count, static_cast<int32_t>(first), &best_[static_cast<size_t>(thread) * W_ + w]);
      }
    }
  });
  if (in_.top_k == 0) return;
  walk.phase(W_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      kernels.top_k(m.logits.get() + w * V, V, in_.top_k, top_k_.data() + w * in_.top_k);
    }
  });
}

StepOutput Step::output() const {
  StepOutput out;
  for (int w = 0; w < W_; ++w) {
    Best best = best_[static_cast<size_t>(w)];
    for (int thread = 1; thread < threads_; ++thread) {
      const Best& other = best_[static_cast<size_t>(thread) * W_ + w];
      best.finite = best.finite && other.finite;
      if (other.token >= 0 && (best.token < 0 || other.value > best.value || (other.value == best.value && other.token < best.token))) {
        best.value = other.value;
        best.token = other.token;
      }
    }
    out.best.push_back(best.finite ? best.token : -1);
  }
  out.top_k = top_k_;
  if (in_.keep_logits) out.logits = m.logits;
  out.hidden = hidden_;
  return out;
}

}  // namespace

StepOutput Model::step(const std::shared_ptr<Model>& model, StepInput input) {
  const std::lock_guard<std::mutex> lock(model->busy);
  const auto step = std::make_shared<Step>(model, std::move(input));
  model->pool->run(step);
  return step->output();
}

}  // namespace shoestring
