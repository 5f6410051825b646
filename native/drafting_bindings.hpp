// The merged drafter's hot part, for Python.
#pragma once

#include <nanobind/nanobind.h>

namespace shoestring {

void bind_drafting(nanobind::module_& module);

}  // namespace shoestring
