#pragma once

#include <nanobind/nanobind.h>

namespace shoestring {

void bind_step_layout(nanobind::module_& module);

}  // namespace shoestring
