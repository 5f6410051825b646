// A decoder-only transformer of the Llama family: its shape, its weights where they lie, and the buffers of a step.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "kv_storage.hpp"
#include "matrix.hpp"
#include "thread_pool.hpp"

namespace shoestring {

// Rotary positions: an angle is position * inverse_frequency; cosine and sine are multiplied by `scaling`.
struct Rope {
  std::vector<float> inverse_frequencies;  // [D/2]
  float scaling = 1;
};

// A matrix with the kernel that runs it. `matrix.data` is null where the layer has none.
struct Linear {
  Matrix matrix{};
  const Kernel* kernel = nullptr;
  std::vector<float> bias;  // empty: none
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  // Empty where the architecture has none. Weights that are stored as w - 1 come with the 1 added.
  std::vector<float> attention_norm, mlp_norm, post_attention_norm, post_mlp_norm, q_norm, k_norm;
  int window = 0;  // keys this far back and further are hidden; 0: none are
  int rope = 0;    // index into Model::ropes; -1: no rotation
};

struct ModelShape {
  int E = 0;  // hidden size
  int H = 0;  // attention heads
  int K = 0;  // key-value heads
  int D = 0;  // head dimension
  int F = 0;  // feedforward width
  int V = 0;  // vocabulary
  float epsilon = 1e-6f;
  float attention_scale = 1;
  float attention_softcap = 0;  // 0: none
  float logit_softcap = 0;      // 0: none
  float embedding_scale = 1;
  Activation activation = Activation::silu;
  bool adjacent_pairs = false;  // rotary pairs are (2i, 2i + 1), as GGUF permutes Llama's weights, not (i, i + D/2)
  bool bf16_cache = false;
};

// One slot's rows in a packed step.
struct Segment {
  std::shared_ptr<KvStorage> storage;
  int64_t cached = 0;
  int rows = 0;
};

struct StepInput {
  std::vector<Segment> segments;
  std::vector<int32_t> tokens;   // [T], ignored for rows that bring an embedding
  std::vector<int32_t> parents;  // [T], within the segment, -1 for its first row
  std::vector<int32_t> wanted;   // [W] packed rows whose logits are computed, ascending
  std::vector<int32_t> embedding_rows;
  std::vector<float> embeddings;  // [embedding_rows][E]
  std::vector<int32_t> hidden_layers;
  int top_k = 0;
  bool keep_logits = false;
};

struct StepOutput {
  std::vector<int32_t> best;   // [W]; -1 where the logits are not finite
  std::vector<int32_t> top_k;  // [W][top_k]
  std::shared_ptr<float> logits;               // [W][V]
  std::vector<std::shared_ptr<float>> hidden;  // per layer asked for, [T][E]
};

// Memory that grows and is reused from step to step.
struct Buffer {
  std::shared_ptr<uint8_t> data;
  int64_t capacity = 0;

  float* floats() const { return reinterpret_cast<float*>(data.get()); }
  void reserve(int64_t bytes) {
    if (bytes <= capacity) return;
    data.reset();
    data = allocate(bytes);
    capacity = bytes;
  }
};

// Rows of activations in each format that some matrix wants.
struct PreparedRows {
  static constexpr int kFormats = 3;
  bool used[kFormats] = {};
  size_t stride[kFormats] = {};
  Buffer rows[kFormats];

  void plan(const Linear& linear);
  void reserve(int64_t T);
  uint8_t* row(ActivationFormat format, int64_t t) const {
    const int f = static_cast<int>(format);
    return rows[f].data.get() + static_cast<size_t>(t) * stride[f];
  }
  bool has(ActivationFormat format) const { return used[static_cast<int>(format)]; }
};

class Model {
 public:
  ModelShape shape;
  std::vector<Rope> ropes;
  std::vector<Layer> layers;
  Matrix embedding{};
  Linear head;
  std::vector<float> final_norm;
  InstructionSet isa = InstructionSet::portable;
  ThreadPool* pool = nullptr;  // not owned: a late worker may be the last to let go of the model

  // Checks the shapes and finds the kernels. Throws std::invalid_argument with what is wrong.
  void finish();
  KvShape kv_shape() const;

  // The caller keeps the model alive until the step is over; late workers touch only what the step itself owns.
  static StepOutput step(const std::shared_ptr<Model>& model, StepInput input);

  // Buffers, reused from step to step -------------------------------------------------------------------------
  std::mutex busy;
  PreparedRows inputs, attended, gated;  // of width E, H D and F
  Buffer x, branch, qkv, gate, up, angles, partial_sums, partial_statistics, scratch;
  std::shared_ptr<float> logits;
  int64_t logits_capacity = 0;

 private:
  void check(Linear& linear, int64_t rows, int64_t cols, const std::string& name) const;
};

}  // namespace shoestring
