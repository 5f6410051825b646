#include "cpu_features.hpp"

namespace shoestring {

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
#define SHOESTRING_FEATURE(builtin_name, name) \
  if (__builtin_cpu_supports(builtin_name)) found.emplace_back(name)
  SHOESTRING_FEATURE("avx2", "avx2");
  SHOESTRING_FEATURE("fma", "fma");
  SHOESTRING_FEATURE("avx512f", "avx512f");
  SHOESTRING_FEATURE("avx512bw", "avx512bw");
  SHOESTRING_FEATURE("avx512vl", "avx512vl");
  SHOESTRING_FEATURE("avx512dq", "avx512dq");
  SHOESTRING_FEATURE("avx512vnni", "avx512_vnni");
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 11)
  SHOESTRING_FEATURE("avx512bf16", "avx512_bf16");
#endif
#undef SHOESTRING_FEATURE
#elif defined(__aarch64__) || defined(_M_ARM64)
  found.emplace_back("neon");
#endif
  return found;
}

}  // namespace shoestring
