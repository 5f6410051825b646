// Python's door to the native part.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.hpp"
#include "drafting_bindings.hpp"
#include "fastff_bindings.hpp"
#include "quantized_bindings.hpp"
#include "step_bindings.hpp"
#include "step_layout_bindings.hpp"

namespace nb = nanobind;

NB_MODULE(_native, module) {
  module.doc() = "Native kernels of Shoestring.";
  module.def("cpu_features", &shoestring::cpu_features,
             "Vector instruction sets that this processor and its operating system let us use.");
  shoestring::bind_step(module);
  shoestring::bind_step_layout(module);
  shoestring::bind_drafting(module);
  shoestring::bind_quantized(module);
  shoestring::bind_fastff(module);
}
