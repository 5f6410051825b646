#include "model.hpp"

#include <stdexcept>

namespace shoestring {

void PreparedRows::plan(const Linear& linear) {
  if (linear.kernel == nullptr) return;
  const int format = static_cast<int>(linear.kernel->activations);
  used[format] = true;
  // An odd number of cache lines between rows, so that they do not share cache sets.
  const int64_t bytes = round_up(static_cast<int64_t>(prepared_bytes(linear.kernel->activations, linear.matrix.cols)), 64);
  stride[format] = static_cast<size_t>(bytes % 128 == 0 ? bytes + 64 : bytes);
}

void PreparedRows::reserve(int64_t T) {
  for (int format = 0; format < kFormats; ++format) {
    if (used[format]) rows[format].reserve(T * static_cast<int64_t>(stride[format]));
  }
}

KvShape Model::kv_shape() const { return {static_cast<int>(layers.size()), shape.K, shape.D, shape.bf16_cache}; }

void Model::check(Linear& linear, int64_t rows, int64_t cols, const std::string& name) const {
  const Matrix& w = linear.matrix;
  if (w.data == nullptr) throw std::invalid_argument("the weight " + name + " is missing");
  if (w.rows != rows || w.cols != cols) {
    throw std::invalid_argument("the weight " + name + " is [" + std::to_string(w.rows) + ", " + std::to_string(w.cols) +
                                "], not [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
  }
  linear.kernel = find_kernel(w.type, isa);
  if (linear.kernel == nullptr || 16 % linear.kernel->row_multiple != 0) {
    throw std::invalid_argument("no kernel runs weights of type " + std::to_string(static_cast<int>(w.type)) + " (" + name +
                                ")");
  }
  if (!linear.bias.empty() && static_cast<int64_t>(linear.bias.size()) != rows) {
    throw std::invalid_argument("the bias of " + name + " has " + std::to_string(linear.bias.size()) + " values, not " +
                                std::to_string(rows));
  }
}

void Model::finish() {
  const ModelShape& s = shape;
  if (s.E <= 0 || s.H <= 0 || s.K <= 0 || s.F <= 0 || s.V <= 0 || layers.empty()) {
    throw std::invalid_argument("a model needs layers, heads and widths above 0");
  }
  if (s.H % s.K != 0) throw std::invalid_argument("the attention heads are not a multiple of the key-value heads");
  if (s.D % 8 != 0 || s.D < 8 || s.D > kMostHeadDimension) {
    throw std::invalid_argument("the head dimension " + std::to_string(s.D) + " is not a multiple of 8 within [8, 512]");
  }
  const auto vector = [](const std::vector<float>& v, int n, bool optional, const std::string& name) {
    if ((optional && v.empty()) || static_cast<int>(v.size()) == n) return;
    throw std::invalid_argument("the weight " + name + " has " + std::to_string(v.size()) + " values, not " +
                                std::to_string(n));
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    Layer& layer = layers[i];
    const std::string name = "of layer " + std::to_string(i);
    check(layer.q, static_cast<int64_t>(s.H) * s.D, s.E, "q_proj " + name);
    check(layer.k, static_cast<int64_t>(s.K) * s.D, s.E, "k_proj " + name);
    check(layer.v, static_cast<int64_t>(s.K) * s.D, s.E, "v_proj " + name);
    check(layer.o, s.E, static_cast<int64_t>(s.H) * s.D, "o_proj " + name);
    check(layer.gate, s.F, s.E, "gate_proj " + name);
    check(layer.up, s.F, s.E, "up_proj " + name);
    check(layer.down, s.E, s.F, "down_proj " + name);
    vector(layer.attention_norm, s.E, false, "input_layernorm " + name);
    vector(layer.mlp_norm, s.E, false, "the norm before the MLP " + name);
    vector(layer.post_attention_norm, s.E, true, "the norm after attention " + name);
    vector(layer.post_mlp_norm, s.E, true, "the norm after the MLP " + name);
    vector(layer.q_norm, s.D, true, "q_norm " + name);
    vector(layer.k_norm, s.D, true, "k_norm " + name);
    if (layer.rope >= static_cast<int>(ropes.size())) throw std::invalid_argument("no rotary frequencies " + name);
    for (const Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.gate, &layer.up}) inputs.plan(*linear);
    attended.plan(layer.o);
    gated.plan(layer.down);
  }
  for (const Rope& rope : ropes) {
    if (static_cast<int>(rope.inverse_frequencies.size()) != s.D / 2) {
      throw std::invalid_argument("rotary frequencies must be half the head dimension");
    }
  }
  check(head, s.V, s.E, "lm_head");
  inputs.plan(head);
  vector(final_norm, s.E, false, "norm");
  if (embedding.data == nullptr || embedding.rows != s.V || embedding.cols != s.E) {
    throw std::invalid_argument("the embedding is not [vocabulary, hidden size]");
  }
}

}  // namespace shoestring
