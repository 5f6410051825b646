#include "step_bindings.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.hpp"

namespace nb = nanobind;

namespace shoestring {
namespace {

using Integers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const char* name_of(InstructionSet isa) {
  switch (isa) {
    case InstructionSet::avx2:
      return "avx2";
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx512_bf16_vnni:
      return "avx512_bf16_vnni";
    case InstructionSet::neon:
      return "neon";
    default:
      return "portable";
  }
}

InstructionSet instruction_set(const std::string& name) {
  if (name.empty()) return best_instruction_set();
  int count;
  const InstructionSet* sets = available_instruction_sets(&count);
  for (int i = 0; i < count; ++i) {
    if (name == name_of(sets[i])) return sets[i];
  }
  throw std::invalid_argument("the instruction set '" + name + "' is not available on this machine");
}

// A Python object's bytes, held for as long as this lives.
class HeldBuffer {
 public:
  explicit HeldBuffer(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
  }
  ~HeldBuffer() { PyBuffer_Release(&view_); }
  HeldBuffer(const HeldBuffer&) = delete;
  HeldBuffer& operator=(const HeldBuffer&) = delete;
  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  int64_t size() const { return static_cast<int64_t>(view_.len); }

 private:
  Py_buffer view_{};
};

Matrix matrix_of(const HeldBuffer& buffer, int type, int64_t rows, int64_t cols, const std::string& name) {
  const auto weight_type = static_cast<WeightType>(type);
  const int64_t bytes = matrix_bytes(weight_type, rows, cols);
  if (bytes < 0 || buffer.size() < bytes) {
    throw std::invalid_argument("the weight " + name + " of type " + std::to_string(type) + " and shape [" +
                                std::to_string(rows) + ", " + std::to_string(cols) + "] needs " + std::to_string(bytes) +
                                " bytes, and has " + std::to_string(buffer.size()));
  }
  return {weight_type, rows, cols, buffer.data()};
}

// What Python holds: the model, its threads, and the buffers that the weights lie in.
class NativeModel {
 public:
  NativeModel(const nb::dict& config, const nb::dict& tensors, int threads, const std::string& isa)
      : pool_(ThreadPool::shared(threads)), model_(std::make_shared<Model>()) {
    model_->pool = pool_.get();
    model_->isa = instruction_set(isa);
    read_shape(config);
    read_weights(config, tensors);
    model_->finish();
  }

  NativeModel(const NativeModel&) = delete;
  NativeModel& operator=(const NativeModel&) = delete;

  const std::shared_ptr<Model>& model() const { return model_; }
  int threads() const { return pool_->threads(); }
  std::string isa() const { return name_of(model_->isa); }

 private:
  void read_shape(const nb::dict& config) {
    const auto integer = [&](const char* name) { return nb::cast<int>(config[name]); };
    const auto number = [&](const char* name) { return nb::cast<float>(config[name]); };
    ModelShape& s = model_->shape;
    s.E = integer("hidden_size");
    s.H = integer("num_heads");
    s.K = integer("num_key_value_heads");
    s.D = integer("head_dim");
    s.F = integer("intermediate_size");
    s.V = integer("vocab_size");
    s.epsilon = number("norm_epsilon");
    s.attention_scale = number("attention_scale");
    s.attention_softcap = number("attention_softcap");
    s.logit_softcap = number("logit_softcap");
    s.embedding_scale = number("embedding_scale");
    const auto activation = nb::cast<std::string>(config["activation"]);
    if (activation != "silu" && activation != "gelu_tanh") throw std::invalid_argument("unknown activation " + activation);
    s.activation = activation == "silu" ? Activation::silu : Activation::gelu_tanh;
    s.adjacent_pairs = nb::cast<bool>(config["adjacent_pairs"]);
    s.bf16_cache = nb::cast<bool>(config["bf16_cache"]);
    for (const nb::handle item : nb::cast<nb::list>(config["ropes"])) {
      const auto pair = nb::cast<nb::tuple>(item);
      const auto frequencies = nb::cast<Floats>(pair[0]);
      Rope rope;
      rope.inverse_frequencies.assign(frequencies.data(), frequencies.data() + frequencies.size());
      rope.scaling = nb::cast<float>(pair[1]);
      model_->ropes.push_back(std::move(rope));
    }
  }

  void read_weights(const nb::dict& config, const nb::dict& tensors) {
    const auto windows = nb::cast<std::vector<int>>(config["windows"]);
    const auto layer_ropes = nb::cast<std::vector<int>>(config["layer_ropes"]);
    const bool one_centred = nb::cast<bool>(config["norm_adds_one"]);
    const auto find = [&](const std::string& name) -> nb::object {
      return tensors.contains(name.c_str()) ? nb::object(tensors[name.c_str()]) : nb::none();
    };
    const auto matrix = [&](const std::string& name) -> Matrix {
      const nb::object found = find(name);
      if (found.is_none()) return {};
      const auto parts = nb::cast<nb::tuple>(found);
      held_.push_back(std::make_unique<HeldBuffer>(parts[3]));
      return matrix_of(*held_.back(), nb::cast<int>(parts[0]), nb::cast<int64_t>(parts[1]), nb::cast<int64_t>(parts[2]), name);
    };
    // Norms and biases: any type, one row, copied as floats.
    const auto vector = [&](const std::string& name, float offset) {
      std::vector<float> values;
      const Matrix w = matrix(name);
      if (w.data == nullptr) return values;
      values.resize(static_cast<size_t>(w.cols));
      dequantize_row(w, 0, values.data());
      for (float& value : values) value += offset;
      return values;
    };
    const float offset = one_centred ? 1.0f : 0.0f;
    const auto linear = [&](const std::string& name) {
      Linear result;
      result.matrix = matrix(name + ".weight");
      result.bias = vector(name + ".bias", 0);
      return result;
    };
    if (windows.size() != layer_ropes.size()) throw std::invalid_argument("every layer needs a window and a rope");
    for (size_t i = 0; i < windows.size(); ++i) {
      const std::string prefix = "layers." + std::to_string(i) + ".";
      Layer layer;
      layer.q = linear(prefix + "self_attn.q_proj");
      layer.k = linear(prefix + "self_attn.k_proj");
      layer.v = linear(prefix + "self_attn.v_proj");
      layer.o = linear(prefix + "self_attn.o_proj");
      layer.gate = linear(prefix + "mlp.gate_proj");
      layer.up = linear(prefix + "mlp.up_proj");
      layer.down = linear(prefix + "mlp.down_proj");
      layer.q_norm = vector(prefix + "self_attn.q_norm.weight", offset);
      layer.k_norm = vector(prefix + "self_attn.k_norm.weight", offset);
      layer.attention_norm = vector(prefix + "input_layernorm.weight", offset);
      // Where there are four norms, the one called post_attention comes before the residual is added.
      const bool four = !find(prefix + "pre_feedforward_layernorm.weight").is_none();
      layer.mlp_norm = vector(prefix + (four ? "pre_feedforward_layernorm.weight" : "post_attention_layernorm.weight"), offset);
      if (four) {
        layer.post_attention_norm = vector(prefix + "post_attention_layernorm.weight", offset);
        layer.post_mlp_norm = vector(prefix + "post_feedforward_layernorm.weight", offset);
      }
      layer.window = windows[i];
      layer.rope = layer_ropes[i];
      model_->layers.push_back(std::move(layer));
    }
    model_->embedding = matrix("embed_tokens.weight");
    model_->final_norm = vector("norm.weight", offset);
    model_->head = linear("lm_head");
    if (model_->head.matrix.data == nullptr) model_->head.matrix = model_->embedding;
  }

  // Destroyed last to first: the model goes before its threads.
  std::shared_ptr<ThreadPool> pool_;
  std::vector<std::unique_ptr<HeldBuffer>> held_;
  std::shared_ptr<Model> model_;
};

// What Python holds of a sequence's cache. A step shares the storage, never this object: the last to let go of a step may be
// a late worker, which must not need the interpreter (at exit it would be stopped inside a destructor).
struct NativeStorage {
  std::shared_ptr<KvStorage> storage;
};

template <typename T>
std::vector<T> values_of(const nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

nb::object rows_of(const std::shared_ptr<float>& memory, size_t rows, size_t cols) {
  if (!memory) return nb::none();
  auto* owner = new std::shared_ptr<float>(memory);
  const nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::shared_ptr<float>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, float>(memory.get(), {rows, cols}, capsule));
}

nb::object table_of(std::vector<int32_t>&& values, size_t rows) {
  auto* owner = new std::vector<int32_t>(std::move(values));
  const nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, int32_t>(owner->data(), {rows, rows ? owner->size() / rows : 0}, capsule));
}

// (best [W], top_k [W, k], logits [W V] or None, [hidden [T E], ...])
nb::tuple step(const NativeModel& native, const std::vector<const NativeStorage*>& storages,
               const std::vector<int64_t>& cached, const std::vector<int>& rows, const Integers& tokens, const Integers& parents,
               const Integers& wanted, const Integers& embedding_rows, const Rows& embeddings,
               const std::vector<int32_t>& hidden_layers, int top_k, bool keep_logits) {
  const std::shared_ptr<Model>& model = native.model();
  const auto E = static_cast<size_t>(model->shape.E);
  StepInput input;
  if (storages.size() != cached.size() || storages.size() != rows.size()) {
    throw std::invalid_argument("every slot needs its storage, its length and its rows");
  }
  for (size_t i = 0; i < storages.size(); ++i) {
    if (storages[i] == nullptr) throw std::invalid_argument("a slot has no storage");
    const std::shared_ptr<KvStorage>& storage = storages[i]->storage;
    const KvShape &a = storage->shape(), b = model->kv_shape();
    if (a.layers != b.layers || a.heads != b.heads || a.D != b.D || a.bf16 != b.bf16 || cached[i] < 0 ||
        storage->capacity() < cached[i] + rows[i]) {
      throw std::invalid_argument("a slot's storage has no room for the step, or is another model's");
    }
    input.segments.push_back({storage, cached[i], rows[i]});
  }
  input.tokens = values_of(tokens);
  input.parents = values_of(parents);
  input.wanted = values_of(wanted);
  input.embedding_rows = values_of(embedding_rows);
  if (embeddings.shape(0) != embedding_rows.size() || (embedding_rows.size() > 0 && embeddings.shape(1) != E)) {
    throw std::invalid_argument("embeddings must be one row of the hidden size each");
  }
  input.embeddings.assign(embeddings.data(), embeddings.data() + embeddings.size());
  input.hidden_layers = hidden_layers;
  input.top_k = top_k;
  input.keep_logits = keep_logits;
  StepOutput output;
  {
    const nb::gil_scoped_release release;
    output = Model::step(model, std::move(input));
  }
  nb::list hidden;
  for (const std::shared_ptr<float>& states : output.hidden) hidden.append(rows_of(states, tokens.size(), E));
  return nb::make_tuple(output.best, table_of(std::move(output.top_k), wanted.size()),
                        rows_of(output.logits, wanted.size(), static_cast<size_t>(model->shape.V)), hidden);
}

nb::object pack_bf16_tiles(nb::handle weights, int64_t rows, int64_t cols) {
  const HeldBuffer source(weights);
  if (source.size() < rows * cols * 2) throw std::invalid_argument("the matrix has fewer bytes than its shape says");
  const int64_t bytes = matrix_bytes(WeightType::bf16_tiles, rows, cols);
  const std::shared_ptr<uint8_t> memory = allocate(bytes);
  {
    const nb::gil_scoped_release release;
    const int64_t tile_bytes = (cols + 1) / 2 * 64;
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t* from = source.data() + row * cols * 2;
      uint8_t* to = memory.get() + row / 16 * tile_bytes + row % 16 * 4;
      for (int64_t c = 0; c + 1 < cols; c += 2) std::memcpy(to + c * 32, from + c * 2, 4);
      if (cols % 2 != 0) std::memcpy(to + (cols - 1) * 32, from + (cols - 1) * 2, 2);
    }
  }
  auto* owner = new std::shared_ptr<uint8_t>(memory);
  const nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::shared_ptr<uint8_t>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, uint8_t>(memory.get(), {static_cast<size_t>(bytes)}, capsule));
}

// y = x W^T on one thread, for tests. `dots` asks for the kernel of pair dot products.
void multiply(int type, int64_t rows, int64_t cols, nb::handle weights, const Rows& x, const WritableRows& y,
              const std::string& isa, bool dots) {
  const HeldBuffer buffer(weights);
  const Matrix w = matrix_of(buffer, type, rows, cols, "matrix");
  const InstructionSet set = instruction_set(isa);
  const Kernel* kernel = dots ? &vector_kernels(set).bf16_tiles_dot : find_kernel(w.type, set);
  if (!dots && w.type == WeightType::bf16_tiles) kernel = &vector_kernels(set).bf16_tiles;
  if (kernel == nullptr || kernel->multiply == nullptr) throw std::invalid_argument("there is no such kernel");
  const size_t T = x.shape(0), stride = prepared_bytes(kernel->activations, cols) + 64;
  if (x.shape(1) != static_cast<size_t>(cols) || y.shape(0) != T || y.shape(1) != static_cast<size_t>(rows)) {
    throw std::invalid_argument("the shapes of x, W and y do not fit");
  }
  const std::shared_ptr<uint8_t> prepared = allocate(static_cast<int64_t>(T * stride));
  for (size_t t = 0; t < T; ++t) {
    prepare_row(kernel->activations, set, x.data() + t * static_cast<size_t>(cols), cols, prepared.get() + t * stride);
  }
  kernel->multiply(w, prepared.get(), stride, static_cast<int>(T), 0, rows, y.data(), rows);
}

// Reads memory once, as fast as all threads can.
class ReadJob : public Job {
 public:
  ReadJob(const float* data, int64_t floats, int threads, const VectorKernels& kernels)
      : Job(1), data_(data), floats_(floats), threads_(threads), kernels_(kernels) {}
  void work(int) override {
    Walk walk(*this, threads_);
    walk.phase(floats_, int64_t{1} << 16, [&](int64_t begin, int64_t end) {
      volatile float sum = kernels_.read_all(data_ + begin, end - begin);
      (void)sum;
    });
  }

 private:
  const float* data_;
  int64_t floats_;
  int threads_;
  const VectorKernels& kernels_;
};

// Bytes per second of the fastest of a few passes over a buffer: the floor under every step that reads all weights.
double read_bandwidth(int64_t bytes, int threads) {
  const nb::gil_scoped_release release;
  const std::shared_ptr<uint8_t> memory = allocate(bytes);
  std::memset(memory.get(), 1, static_cast<size_t>(bytes));
  const std::shared_ptr<ThreadPool> pool = ThreadPool::shared(threads);
  const auto* data = reinterpret_cast<const float*>(memory.get());
  double best = 0;
  for (int pass = 0; pass < 7; ++pass) {
    const auto job = std::make_shared<ReadJob>(data, bytes / 4, threads, vector_kernels(best_instruction_set()));
    const auto began = std::chrono::steady_clock::now();
    pool->run(job);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    best = std::max(best, static_cast<double>(bytes) / seconds.count());
  }
  return best;
}

}  // namespace

void bind_step(nb::module_& module) {
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    int count;
    const InstructionSet* sets = available_instruction_sets(&count);
    for (int i = 0; i < count; ++i) names.emplace_back(name_of(sets[i]));
    return names;
  });
  module.def("available_processors", &available_processors);
  module.def("matrix_bytes", [](int type, int64_t rows, int64_t cols) {
    return matrix_bytes(static_cast<WeightType>(type), rows, cols);
  });
  module.def("read_bandwidth", &read_bandwidth, nb::arg("bytes"), nb::arg("threads"));
  module.def("pack_bf16_tiles", &pack_bf16_tiles, nb::arg("weights"), nb::arg("rows"), nb::arg("cols"));
  module.def("multiply", &multiply, nb::arg("type"), nb::arg("rows"), nb::arg("cols"), nb::arg("weights"), nb::arg("x"),
             nb::arg("y"), nb::arg("isa") = "", nb::arg("dots") = false);
  module.def("dequantize_row", [](int type, int64_t rows, int64_t cols, nb::handle weights, int64_t row, WritableRows out) {
    const HeldBuffer buffer(weights);
    if (row < 0 || row >= rows || out.size() < static_cast<size_t>(cols)) throw std::invalid_argument("no such row");
    dequantize_row(matrix_of(buffer, type, rows, cols, "matrix"), row, out.data());
  });

  nb::class_<NativeStorage>(module, "Storage")
      .def_prop_ro("capacity", [](const NativeStorage& self) { return self.storage->capacity(); })
      .def_prop_ro("nbytes", [](const NativeStorage& self) { return self.storage->bytes(); })
      .def(
          "reserve",
          [](NativeStorage& self, int64_t slots, int64_t keep) {
            if (keep < 0 || keep > self.storage->capacity()) throw std::invalid_argument("there is not so much to keep");
            self.storage->reserve(slots, keep);
          },
          nb::arg("slots"), nb::arg("keep"))
      .def(
          "copy_prefix",
          [](NativeStorage& self, const NativeStorage& source, int64_t length) {
            if (length < 0 || length > self.storage->capacity() || length > source.storage->capacity()) {
              throw std::invalid_argument("no room for the prefix");
            }
            self.storage->copy_prefix(*source.storage, length);
          },
          nb::arg("source"), nb::arg("length"))
      .def(
          "gather",
          [](NativeStorage& self, int64_t first, const std::vector<int64_t>& rows) {
            for (const int64_t row : rows) {
              if (first < 0 || row < 0 || first + row >= self.storage->capacity()) throw std::invalid_argument("no such row");
            }
            self.storage->gather(first, rows);
          },
          nb::arg("first"), nb::arg("rows"));

  nb::class_<NativeModel>(module, "Model")
      .def(nb::init<const nb::dict&, const nb::dict&, int, const std::string&>(), nb::arg("config"), nb::arg("tensors"),
           nb::arg("threads"), nb::arg("instruction_set") = "")
      .def_prop_ro("threads", &NativeModel::threads)
      .def_prop_ro("instruction_set", &NativeModel::isa)
      .def("storage",
           [](const NativeModel& self) { return NativeStorage{std::make_shared<KvStorage>(self.model()->kv_shape())}; })
      .def("step", &step);
}

}  // namespace shoestring
