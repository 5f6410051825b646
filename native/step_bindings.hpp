// The step: models, their caches, and the dense kernels one by one.
#pragma once

#include <nanobind/nanobind.h>

namespace shoestring {

void bind_step(nanobind::module_& module);

}  // namespace shoestring
