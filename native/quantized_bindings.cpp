#include "quantized_bindings.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.hpp"
#include "quantized.hpp"

namespace nb = nanobind;

namespace shoestring {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

struct NamedSet {
  const char* name;
  InstructionSet isa;
  std::vector<std::string> needs;
};

const std::vector<NamedSet>& instruction_sets() {
  static const std::vector<NamedSet> sets = {
      {"portable", InstructionSet::portable, {}},
      {"neon", InstructionSet::neon, {"neon"}},
      {"avx2", InstructionSet::avx2, {"avx2", "fma"}},
      {"avx512", InstructionSet::avx512, {"avx512f", "avx512bw", "avx512vl"}},
      {"avx512_bf16_vnni",
       InstructionSet::avx512_bf16_vnni,
       {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}},
  };
  return sets;
}

bool available(const NamedSet& set) {
  const std::vector<std::string> features = cpu_features();
  return std::all_of(set.needs.begin(), set.needs.end(), [&](const std::string& feature) {
    return std::find(features.begin(), features.end(), feature) != features.end();
  });
}

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const NamedSet& set : instruction_sets()) {
    if (available(set)) names.emplace_back(set.name);
  }
  return names;
}

InstructionSet instruction_set(const std::string& name) {
  for (const NamedSet& set : instruction_sets()) {
    if (name == set.name && available(set)) return set.isa;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

Matrix matrix(int type, const Bytes& data, int64_t rows, int64_t cols) {
  const auto weight_type = static_cast<WeightType>(type);
  const int64_t bytes = quantized_matrix_bytes(weight_type, rows, cols);
  if (bytes < 0 || data.size() < static_cast<size_t>(bytes)) {
    throw std::invalid_argument("type " + std::to_string(type) + " of shape [" + std::to_string(rows) + ", " +
                                std::to_string(cols) + "] needs " + std::to_string(bytes) + " bytes, got " +
                                std::to_string(data.size()));
  }
  return {weight_type, rows, cols, data.data()};
}

size_t row_bytes(const Kernel& kernel, int64_t cols) {
  return kernel.activations == ActivationFormat::int8_blocks ? int8_blocks_bytes(cols)
                                                             : static_cast<size_t>(cols) * sizeof(float);
}

// Prepared rows for the kernel of (type, isa), one after another.  // [T * row bytes]
void quantized_prepare(int type, const std::string& isa, Rows x, WritableBytes out) {
  const InstructionSet set = instruction_set(isa);
  const Kernel* kernel = find_quantized_kernel(static_cast<WeightType>(type), set);
  const auto cols = static_cast<int64_t>(x.shape(1));
  if (!kernel) throw std::invalid_argument("no kernels for type " + std::to_string(type));
  const size_t stride = row_bytes(*kernel, cols);
  if (out.size() < stride * x.shape(0)) throw std::invalid_argument("the output is too small");
  for (size_t t = 0; t < x.shape(0); ++t) {
    const float* row = x.data() + t * x.shape(1);
    if (kernel->activations == ActivationFormat::int8_blocks) {
      prepare_int8_blocks(set, row, cols, out.data() + t * stride);
    } else {
      std::memcpy(out.data() + t * stride, row, stride);
    }
  }
}

int64_t quantized_prepared_bytes(int type, const std::string& isa, int64_t cols) {
  const Kernel* kernel = find_quantized_kernel(static_cast<WeightType>(type), instruction_set(isa));
  if (!kernel) throw std::invalid_argument("no kernels for type " + std::to_string(type));
  return static_cast<int64_t>(row_bytes(*kernel, cols));
}

// y[:, first:last] = x W[first:last]^T for prepared x; the other columns of y are left alone.
void quantized_multiply(int type, const std::string& isa, Bytes data, int64_t rows, int64_t cols, Bytes prepared,
                        int64_t first, int64_t last, WritableRows y) {
  const Matrix w = matrix(type, data, rows, cols);
  const Kernel* kernel = find_quantized_kernel(w.type, instruction_set(isa));
  if (!kernel) throw std::invalid_argument("no kernels for type " + std::to_string(type));
  const size_t stride = row_bytes(*kernel, cols);
  if (first < 0 || first > last || last > rows || first % kernel->row_multiple) {
    throw std::invalid_argument("rows " + std::to_string(first) + ".." + std::to_string(last) +
                                " are no range of the " + std::to_string(rows) + ", or the first no multiple of " +
                                std::to_string(kernel->row_multiple));
  }
  if (y.shape(1) != static_cast<size_t>(rows) || prepared.size() < stride * y.shape(0)) {
    throw std::invalid_argument("the shapes of x, W and y do not fit");
  }
  const uint8_t* x = prepared.data();
  float* out = y.data();
  const int T = static_cast<int>(y.shape(0));
  nb::gil_scoped_release release;
  kernel->multiply(w, x, stride, T, first, last, out, rows);
}

void quantized_dequantize(int type, Bytes data, int64_t rows, int64_t cols, WritableRows out) {
  const Matrix w = matrix(type, data, rows, cols);
  if (out.shape(0) != static_cast<size_t>(rows) || out.shape(1) != static_cast<size_t>(cols)) {
    throw std::invalid_argument("the output's shape is not [rows, cols]");
  }
  float* values = out.data();
  nb::gil_scoped_release release;
  for (int64_t row = 0; row < rows; ++row) dequantize_quantized_row(w, row, values + row * cols);
}

void quantized_pack(int type, Rows w, WritableBytes out) {
  const auto rows = static_cast<int64_t>(w.shape(0)), cols = static_cast<int64_t>(w.shape(1));
  const auto weight_type = static_cast<WeightType>(type);
  const int64_t bytes = quantized_matrix_bytes(weight_type, rows, cols);
  if ((weight_type != WeightType::int8_tiles && weight_type != WeightType::int4_tiles) || bytes < 0 ||
      out.size() < static_cast<size_t>(bytes)) {
    throw std::invalid_argument("type " + std::to_string(type) + " cannot be packed from this shape into this output");
  }
  const float* from = w.data();
  uint8_t* to = out.data();
  nb::gil_scoped_release release;
  weight_type == WeightType::int8_tiles ? pack_int8_tiles(from, rows, cols, to) : pack_int4_tiles(from, rows, cols, to);
}

}  // namespace

void bind_quantized(nb::module_& module) {
  module.def("available_instruction_sets", &available_instruction_sets,
             "Names of the instruction sets whose kernels run here, best last.");
  module.def("quantized_matrix_bytes", [](int type, int64_t rows, int64_t cols) {
    return quantized_matrix_bytes(static_cast<WeightType>(type), rows, cols);
  });
  module.def("quantized_row_multiple", [](int type, const std::string& isa) {
    const Kernel* kernel = find_quantized_kernel(static_cast<WeightType>(type), instruction_set(isa));
    return kernel ? kernel->row_multiple : 0;
  });
  module.def("quantized_prepared_bytes", &quantized_prepared_bytes);
  module.def("quantized_prepare", &quantized_prepare);
  module.def("quantized_multiply", &quantized_multiply);
  module.def("quantized_dequantize", &quantized_dequantize);
  module.def("quantized_pack", &quantized_pack);
}

}  // namespace shoestring
