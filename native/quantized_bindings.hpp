// The quantised kernels one by one, for tests and benchmarks.
#pragma once

#include <nanobind/nanobind.h>

namespace shoestring {

void bind_quantized(nanobind::module_& module);

}  // namespace shoestring
