// The fast feedforward kernels, as Python sees them.
#pragma once

#include <nanobind/nanobind.h>

namespace shoestring {

void bind_fastff(nanobind::module_& module);

}  // namespace shoestring
