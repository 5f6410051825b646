// Fast feedforward (arXiv 2311.10770): K binary trees of neurons, of which a token visits one path each.
//
//   node = 0;  for level in 0..D:  z = x . w_in[node] + b_in[node];  y += f(z) * w_out[node];  node = 2 node + 1 + (z > 0)
//
// The walk needs only the dot products; a path's rows of w_out are summed in one pass when it has ended. Each sum runs
// in one order (tree by tree, from the root down), whatever the number of tokens and threads: a token's output does not
// depend, bit for bit, on the other tokens of its batch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "matrix.hpp"
#include "thread_pool.hpp"

namespace shoestring {

enum class FastffActivation : int32_t { gelu = 0, gelu_tanh = 1, relu = 2, silu = 3 };

// Rows node-major, one tree after another; all of them float or all bfloat16.
struct FastffWeights {
  const uint8_t* w_in;   // [K][n][E]
  const uint8_t* b_in;   // [K][n] or null
  const uint8_t* w_out;  // [K][n][O]
};

struct FastffShape {
  int64_t E, O;
  int depth, trees;
  bool bf16;
  FastffActivation activation;

  int64_t nodes() const { return (int64_t{1} << (depth + 1)) - 1; }
  int element() const { return bf16 ? 2 : 4; }
  int active() const { return trees * (depth + 1); }
};

// A part of the way of some tokens: trees [first_tree, last_tree) from level `first` to before `last`. The part that
// ends at the leaves sums the path's rows of w_out; parts before it leave their ways in `visited` and `logits`.
struct FastffWalk {
  FastffShape shape;
  FastffWeights weights;
  int first_tree, last_tree;
  int first, last;
  int prefetch_from;        // the level from which rows are fetched ahead (the upper ones are in a cache)
  const uint8_t* x;         // [T][E]
  uint8_t* y;               // [T][O]; null: to `sums`, for the trees that follow
  const uint8_t* residual;  // [T][O] to which the first tree adds, or null
  float* sums;              // [T][O] of the trees before; null where the walk takes all trees
  const int32_t* order;     // positions -> tokens, or null
  int32_t* visited;         // [T][K][D+1]; null where the walk is whole and nobody asks
  float* logits;            // [T][K][D+1], likewise
};

// float only.
struct FastffBackward {
  FastffShape shape;
  FastffWeights weights;
  int64_t tokens;
  const float* grad_y;     // [T][O]
  const float* x;          // [T][E]
  const int32_t* visited;  // [T][K][D+1]
  const float* logits;     // [T][K][D+1]
  float* hidden;           // [T][K][D+1] scratch: f(z)
  float* grad_z;           // [T][K][D+1] scratch
  float* grad_x;           // [T][E] or null
  float* grad_w_in;        // [K][n][E]
  float* grad_b_in;        // [K][n] or null
  float* grad_w_out;       // [K][n][O]
  const int32_t* starts;   // [K*n + 1]: a node's visits in `visits`
  const int32_t* visits;   // [T*K*(D+1)] indices into `visited`, by node
};

struct FastffKernels {
  void (*walk_f32)(const FastffWalk& walk, int64_t begin, int64_t end);  // positions
  void (*walk_bf16)(const FastffWalk& walk, int64_t begin, int64_t end);
  void (*backward_tokens)(const FastffBackward& job, int64_t begin, int64_t end);
  // Columns [first, last) of the gradients of a node's two rows, of which the longer sets the range.
  void (*backward_node)(const FastffBackward& job, int64_t node, int64_t first, int64_t last);
};

const FastffKernels& fastff_kernels(InstructionSet isa);

// Layers one after another, of one shape where there are several (then E = O).
class Fastff {
 public:
  Fastff(const FastffShape& shape, std::vector<FastffWeights> layers, InstructionSet isa, bool residual)
      : shape_(shape), layers_(std::move(layers)), isa_(isa), residual_(residual) {}

  const FastffShape& shape() const { return shape_; }
  InstructionSet isa() const { return isa_; }

  // y [T, O] of x [T, E]; the last layer's nodes and logits [T, K, D+1] where asked for. All memory contiguous; y is
  // not x. `pool` may be null: one thread.
  void run(const uint8_t* x, uint8_t* y, int64_t tokens, ThreadPool* pool, int32_t* visited, float* logits) const;

  // Fills in the gradients (see FastffBackward) of a single layer; rows that no token visited become zero.
  void backward(FastffBackward job, ThreadPool* pool) const;

  // Whether a second thread is worth its wake-up call.
  bool worth_threads(int64_t tokens) const;

 private:
  struct WholeJob;
  struct GroupedJob;
  struct BackwardJob;

  FastffWalk whole_walk(size_t layer) const;
  void run_whole(const uint8_t* x, uint8_t* y, int64_t begin, int64_t end, int32_t* visited, float* logits) const;

  FastffShape shape_;
  std::vector<FastffWeights> layers_;
  InstructionSet isa_;
  bool residual_;
};

}  // namespace shoestring
