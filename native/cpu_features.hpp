// Which vector instructions this processor and its operating system let us use.
#pragma once

#include <string>
#include <vector>

namespace shoestring {

// Names as in /proc/cpuinfo, e.g. {"avx2", "fma", "avx512f", "avx512_bf16"}; empty on an unknown architecture.
std::vector<std::string> cpu_features();

}  // namespace shoestring
