#include "fastff.hpp"

#include <algorithm>
#include <cstring>

#include "kernels.hpp"

namespace shoestring {

namespace portable {
const FastffKernels& fastff_kernels();
}
#if defined(SHOESTRING_X86_KERNELS)
namespace avx2 {
const FastffKernels& fastff_kernels();
}
namespace avx512 {
const FastffKernels& fastff_kernels();
}
namespace avx512_bf16 {
const FastffKernels& fastff_kernels();
}
#elif defined(SHOESTRING_NEON_KERNELS)
namespace neon {
const FastffKernels& fastff_kernels();
}
#endif

const FastffKernels& fastff_kernels(InstructionSet isa) {
  switch (isa) {
#if defined(SHOESTRING_X86_KERNELS)
    case InstructionSet::avx2:
      return avx2::fastff_kernels();
    case InstructionSet::avx512:
      return avx512::fastff_kernels();
    case InstructionSet::avx512_bf16_vnni:
      return avx512_bf16::fastff_kernels();
#elif defined(SHOESTRING_NEON_KERNELS)
    case InstructionSet::neon:
      return neon::fastff_kernels();
#endif
    default:
      return portable::fastff_kernels();
  }
}

namespace {

// Rows of w_in that stay in the second-level cache while many tokens pass.
constexpr int64_t kResident = 768 << 10;
// Tokens for each subtree below the upper levels, so that sorting tokens by subtree pays.
constexpr int64_t kTokensPerSubtree = 8;
// Tokens sorted at a time: bounds the memory of a call.
constexpr int64_t kBlock = 4096;
constexpr int64_t kChunk = 8;
// Bytes of rows that are worth waking another thread for.
constexpr int64_t kWorthThreads = 384 << 10;
// Visits from which the columns of a node's gradient are shared among threads.
constexpr int64_t kHeavy = 64;
constexpr int64_t kColumns = 128;

int log2_floor(int64_t n) {
  int result = 0;
  while (n >>= 1) ++result;
  return result;
}

// Upper levels for the first of two parts; at least the depth + 1 where two parts are no use.
int upper_levels(const FastffShape& shape, int64_t tokens) {
  const int resident = log2_floor(kResident / (shape.E * shape.element()) + 1);
  const int shared = log2_floor(tokens / kTokensPerSubtree);
  return std::min(resident, shared) > 1 ? std::min(resident, shared) : shape.depth + 1;
}

void walk(const FastffWalk& job, InstructionSet isa, int64_t begin, int64_t end) {
  const FastffKernels& kernels = fastff_kernels(isa);
  (job.shape.bf16 ? kernels.walk_bf16 : kernels.walk_f32)(job, begin, end);
}

}  // namespace

FastffWalk Fastff::whole_walk(size_t layer) const {
  FastffWalk job = {};
  job.shape = shape_;
  job.weights = layers_[layer];
  job.last_tree = shape_.trees;
  job.last = shape_.depth + 1;
  return job;
}

// Tokens [begin, end) through all layers, a few at a time.
void Fastff::run_whole(const uint8_t* x, uint8_t* y, int64_t begin, int64_t end, int32_t* visited,
                       float* logits) const {
  FastffWalk job = whole_walk(0);
  const int upper = log2_floor(end - begin);
  job.prefetch_from = upper > 1 ? upper - 1 : 0;
  if (layers_.size() == 1) {
    job.x = x;
    job.y = y;
    job.residual = residual_ ? x : nullptr;
    job.visited = visited;
    job.logits = logits;
    walk(job, isa_, begin, end);
    return;
  }
  const int64_t row = shape_.E * shape_.element();
  thread_local std::vector<uint8_t> between;
  between.resize(static_cast<size_t>(2 * kChunk * row));
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t tokens = std::min(kChunk, end - at);
    const uint8_t* from = x + at * row;
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
      job.weights = layers_[layer];
      job.x = from;
      job.y = layer + 1 == layers_.size() ? y + at * row : between.data() + (layer % 2) * kChunk * row;
      job.residual = residual_ ? from : nullptr;
      walk(job, isa_, 0, tokens);
      from = job.y;
    }
  }
}

struct Fastff::WholeJob final : Job {
  WholeJob(const Fastff& owner, int threads) : Job(1), owner(owner), threads(threads) {}

  void work(int) override {
    Walk walk(*this, threads);
    // A few tokens are shared evenly: side by side they would be one thread's.
    const int64_t grain = std::min(kChunk, (tokens + threads - 1) / threads);
    walk.phase(tokens, grain, [&](int64_t begin, int64_t end) {
      owner.run_whole(x, y, begin, end, visited, logits);
    });
  }

  const Fastff& owner;  // used within the units of work only, for which the caller waits
  int threads;
  const uint8_t* x;
  uint8_t* y;
  int64_t tokens;
  int32_t* visited;
  float* logits;
};

// Many tokens: the upper levels' rows stay in the cache for all of them; then tokens are sorted by the subtree that they
// have come to, and go on subtree by subtree.
struct Fastff::GroupedJob final : Job {
  GroupedJob(const Fastff& owner, int threads, int upper)
      : Job(static_cast<int>(owner.layers_.size()) * owner.shape_.trees * 2),
        owner(owner),
        threads(threads),
        upper(upper) {}

  void work(int) override {
    Walk way(*this, threads);
    const FastffShape& shape = owner.shape_;
    const size_t layers = owner.layers_.size();
    const int64_t row = shape.E * shape.element();
    for (size_t layer = 0; layer < layers; ++layer) {
      FastffWalk job = owner.whole_walk(layer);
      job.x = layer == 0 ? x : between + ((layer + 1) % 2) * tokens * row;
      uint8_t* const out = layer + 1 == layers ? y : between + (layer % 2) * tokens * row;
      job.sums = shape.bf16 ? sums : reinterpret_cast<float*>(out);
      job.residual = owner.residual_ ? job.x : nullptr;
      job.visited = visited;
      job.logits = logits;
      const auto part = [&](int64_t begin, int64_t end) { walk(job, owner.isa_, begin, end); };
      for (int tree = 0; tree < shape.trees; ++tree) {
        job.first_tree = tree;
        job.last_tree = tree + 1;
        job.y = tree + 1 == shape.trees ? out : nullptr;
        job.order = nullptr;
        job.first = 0;
        job.prefetch_from = job.last = upper;
        way.phase(tokens, kChunk, part, [&] { sort(tree); });
        job.order = order;
        job.first = upper;
        job.last = shape.depth + 1;
        way.phase(tokens, kChunk, part);
      }
    }
  }

  // Tokens in the order of the nodes that they have come to.
  void sort(int tree) {
    const int64_t first = (int64_t{1} << upper) - 1;
    const auto subtree = [&](int64_t t) {
      const int64_t way = (t * owner.shape_.trees + tree) * (owner.shape_.depth + 1) + upper - 1;
      return static_cast<size_t>(2 * int64_t{visited[way]} + 1 + (logits[way] > 0) - first);
    };
    starts.assign((size_t{1} << upper) + 1, 0);
    for (int64_t t = 0; t < tokens; ++t) ++starts[subtree(t) + 1];
    for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    for (int64_t t = 0; t < tokens; ++t) order[starts[subtree(t)]++] = static_cast<int32_t>(t);
  }

  const Fastff owner;  // a copy: a worker that comes late still counts phases when the caller has gone
  int threads, upper;
  const uint8_t* x;
  uint8_t* y;
  int64_t tokens;
  int32_t* visited;
  float* logits;
  uint8_t* between;
  float* sums;
  int32_t* order;
  std::vector<int32_t> starts;
};

bool Fastff::worth_threads(int64_t tokens) const {
  return tokens > 1 && tokens * shape_.active() * (shape_.E + shape_.O) * shape_.element() *
                               static_cast<int64_t>(layers_.size()) >= kWorthThreads;
}

void Fastff::run(const uint8_t* x, uint8_t* y, int64_t tokens, ThreadPool* pool, int32_t* visited,
                 float* logits) const {
  if (tokens <= 0) return;
  const int upper = upper_levels(shape_, std::min(tokens, kBlock));
  if (upper > shape_.depth) {
    if (pool == nullptr || pool->threads() == 1 || !worth_threads(tokens)) {
      run_whole(x, y, 0, tokens, visited, logits);
      return;
    }
    const auto job = std::make_shared<WholeJob>(*this, pool->threads());
    job->x = x;
    job->y = y;
    job->tokens = tokens;
    job->visited = visited;
    job->logits = logits;
    pool->run(job);
    return;
  }
  thread_local std::vector<uint8_t> memory;  // fresh pages would cost more than the sums
  const int64_t element = shape_.element(), most = std::min(tokens, kBlock);
  const int64_t between = layers_.size() > 1 ? round_up(2 * most * shape_.E * element, 64) : 0;
  const int64_t sums = shape_.bf16 && shape_.trees > 1 ? round_up(most * shape_.O * 4, 64) : 0;
  const int64_t ways = visited ? 0 : most * shape_.active() * 4;
  memory.resize(static_cast<size_t>(between + sums + 2 * ways + most * 4));
  ThreadPool alone(1);
  ThreadPool& crew = pool ? *pool : alone;
  for (int64_t at = 0; at < tokens; at += kBlock) {
    const auto job = std::make_shared<GroupedJob>(*this, crew.threads(), upper);
    job->tokens = std::min(kBlock, tokens - at);
    job->x = x + at * shape_.E * element;
    job->y = y + at * shape_.O * element;
    uint8_t* const saved = memory.data() + between + sums;
    job->visited = visited ? visited + at * shape_.active() : reinterpret_cast<int32_t*>(saved);
    job->logits = logits ? logits + at * shape_.active() : reinterpret_cast<float*>(saved + ways);
    job->between = memory.data();
    job->sums = reinterpret_cast<float*>(memory.data() + between);
    job->order = reinterpret_cast<int32_t*>(saved + 2 * ways);
    crew.run(job);
  }
}

struct Fastff::BackwardJob final : Job {
  BackwardJob(const FastffBackward& task, const FastffKernels& kernels, int threads)
      : Job(3), task(task), kernels(kernels), threads(threads) {}

  void work(int) override {
    Walk way(*this, threads);
    const FastffShape& shape = task.shape;
    way.phase(
        task.tokens, 1, [&](int64_t begin, int64_t end) { kernels.backward_tokens(task, begin, end); },
        [&] { sort(); });
    const int64_t columns = std::max(shape.E, shape.O), parts = (columns + kColumns - 1) / kColumns;
    way.phase(static_cast<int64_t>(heavy.size()) * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % parts;
        kernels.backward_node(task, heavy[static_cast<size_t>(i / parts)], part * kColumns, (part + 1) * kColumns);
      }
    });
    way.phase(shape.trees * shape.nodes(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t node = begin; node < end; ++node) {
        if (starts[static_cast<size_t>(node) + 1] - starts[static_cast<size_t>(node)] < kHeavy) {
          kernels.backward_node(task, node, 0, columns);
        }
      }
    });
  }

  // Visits by node.
  void sort() {
    const FastffShape& shape = task.shape;
    const int64_t count = task.tokens * shape.active(), all = shape.trees * shape.nodes();
    const auto node_of = [&](int64_t visit) {
      return static_cast<size_t>(visit / (shape.depth + 1) % shape.trees * shape.nodes() + task.visited[visit]);
    };
    starts.assign(static_cast<size_t>(all) + 1, 0);
    for (int64_t i = 0; i < count; ++i) ++starts[node_of(i) + 1];
    for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    std::vector<int32_t> next(starts.begin(), starts.end() - 1);
    visits.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) visits[static_cast<size_t>(next[node_of(i)]++)] = static_cast<int32_t>(i);
    for (int64_t node = 0; node < all; ++node) {
      if (starts[static_cast<size_t>(node) + 1] - starts[static_cast<size_t>(node)] >= kHeavy) heavy.push_back(node);
    }
    task.starts = starts.data();
    task.visits = visits.data();
  }

  FastffBackward task;
  const FastffKernels& kernels;
  int threads;
  std::vector<int32_t> starts, visits;
  std::vector<int64_t> heavy;
};

void Fastff::backward(FastffBackward task, ThreadPool* pool) const {
  task.shape = shape_;
  task.weights = layers_[0];
  if (task.tokens <= 0) {
    const auto clear = [&](float* gradient, int64_t width) {
      std::memset(gradient, 0, static_cast<size_t>(shape_.trees * shape_.nodes() * width) * sizeof(float));
    };
    clear(task.grad_w_in, shape_.E);
    clear(task.grad_w_out, shape_.O);
    if (task.grad_b_in) clear(task.grad_b_in, 1);
    return;
  }
  std::vector<float> scratch(static_cast<size_t>(2 * task.tokens * shape_.active()) + 1);
  task.hidden = scratch.data();
  task.grad_z = scratch.data() + task.tokens * shape_.active();
  ThreadPool alone(1);
  ThreadPool& crew = pool ? *pool : alone;
  crew.run(std::make_shared<BackwardJob>(task, fastff_kernels(isa_), crew.threads()));
}

}  // namespace shoestring
