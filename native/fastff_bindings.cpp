#include "fastff_bindings.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "fastff.hpp"
#include "kernels.hpp"

namespace nb = nanobind;

namespace shoestring {
namespace {

using Address = uintptr_t;

// Tokens from which other Python threads may run meanwhile: letting them costs as much as a token.
constexpr int64_t kManyTokens = 8;

std::shared_ptr<ThreadPool> pool_of(int threads) {
  static std::mutex mutex;
  static std::shared_ptr<ThreadPool> pool;  // kept: a new one for each call would start its threads anew
  if (threads <= 1) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!pool || pool->threads() != threads) pool = ThreadPool::shared(threads);
  return pool;
}

InstructionSet instruction_set(const std::string& name) {
  if (name.empty()) return best_instruction_set();
  const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16_vnni", "neon"};
  int count;
  const InstructionSet* sets = available_instruction_sets(&count);
  for (int i = 0; i < count; ++i) {
    if (name == names[static_cast<int>(sets[i])]) return sets[i];
  }
  throw std::invalid_argument("the instruction set '" + name + "' is not available on this machine");
}

class FastFeedForward {
 public:
  FastFeedForward(int64_t E, int64_t O, int depth, int trees, bool bf16, int activation,
                  const std::vector<std::tuple<Address, Address, Address>>& layers, bool residual,
                  const std::string& isa)
      : kernel_({E, O, depth, trees, bf16, static_cast<FastffActivation>(activation)}, weights(layers),
                instruction_set(isa), residual) {
    if (E < 1 || O < 1 || depth < 0 || depth > 28 || trees < 1 || activation < 0 || activation > 3 || layers.empty() ||
        ((layers.size() > 1 || residual) && E != O)) {
      throw std::invalid_argument("no fast feedforward layers have these sizes");
    }
  }

  void run(Address x, Address y, int64_t tokens, int threads) const {
    const auto* from = reinterpret_cast<const uint8_t*>(x);
    auto* to = reinterpret_cast<uint8_t*>(y);
    if (tokens < kManyTokens) {
      const std::shared_ptr<ThreadPool> pool = kernel_.worth_threads(tokens) ? pool_of(threads) : nullptr;
      kernel_.run(from, to, tokens, pool.get(), nullptr, nullptr);
      return;
    }
    nb::gil_scoped_release release;
    kernel_.run(from, to, tokens, pool_of(threads).get(), nullptr, nullptr);
  }

  void run_saving(Address x, Address y, Address visited, Address logits, int64_t tokens, int threads) const {
    nb::gil_scoped_release release;
    kernel_.run(reinterpret_cast<const uint8_t*>(x), reinterpret_cast<uint8_t*>(y), tokens, pool_of(threads).get(),
                reinterpret_cast<int32_t*>(visited), reinterpret_cast<float*>(logits));
  }

  void backward(Address grad_y, Address x, Address visited, Address logits, Address grad_x, Address grad_w_in,
                Address grad_b_in, Address grad_w_out, int64_t tokens, int threads) const {
    if (kernel_.shape().bf16) throw std::invalid_argument("the way back is for float32 only");
    nb::gil_scoped_release release;
    FastffBackward job = {};
    job.tokens = tokens;
    job.grad_y = reinterpret_cast<const float*>(grad_y);
    job.x = reinterpret_cast<const float*>(x);
    job.visited = reinterpret_cast<const int32_t*>(visited);
    job.logits = reinterpret_cast<const float*>(logits);
    job.grad_x = reinterpret_cast<float*>(grad_x);
    job.grad_w_in = reinterpret_cast<float*>(grad_w_in);
    job.grad_b_in = reinterpret_cast<float*>(grad_b_in);
    job.grad_w_out = reinterpret_cast<float*>(grad_w_out);
    kernel_.backward(job, pool_of(threads).get());
  }

 private:
  static std::vector<FastffWeights> weights(const std::vector<std::tuple<Address, Address, Address>>& layers) {
    std::vector<FastffWeights> result;
    for (const auto& [w_in, b_in, w_out] : layers) {
      result.push_back({reinterpret_cast<const uint8_t*>(w_in), reinterpret_cast<const uint8_t*>(b_in),
                        reinterpret_cast<const uint8_t*>(w_out)});
    }
    return result;
  }

  Fastff kernel_;
};

// A hint: rows at random places cost a walk of the page tables each, which large pages spare.
bool advise_huge_pages(Address address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr Address kPage = Address{2} << 20;
  const Address first = (address + kPage - 1) / kPage * kPage;
  const Address last = (address + static_cast<Address>(bytes)) / kPage * kPage;
  if (first >= last) return false;
  void* const start = reinterpret_cast<void*>(first);
  if (madvise(start, last - first, MADV_HUGEPAGE) != 0) return false;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1
  return madvise(start, last - first, kCollapse) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

}  // namespace

void bind_fastff(nb::module_& module) {
  nb::class_<FastFeedForward>(module, "FastFeedForward",
                              "Fast feedforward layers over memory that the caller keeps alive; see fastff/native.py.")
      .def(nb::init<int64_t, int64_t, int, int, bool, int, const std::vector<std::tuple<Address, Address, Address>>&,
                    bool, const std::string&>(),
           nb::arg("hidden_size"), nb::arg("output_size"), nb::arg("depth"), nb::arg("trees"), nb::arg("bf16"),
           nb::arg("activation"), nb::arg("layers"), nb::arg("residual") = false, nb::arg("instruction_set") = "")
      .def("run", &FastFeedForward::run)
      .def("run_saving", &FastFeedForward::run_saving)
      .def("backward", &FastFeedForward::backward);
  module.def("advise_huge_pages", &advise_huge_pages,
             "Asks for large pages under this memory; whether the system gave them at once.");
}

}  // namespace shoestring
