// Fast feedforward kernels for AVX-512.
#define SHOESTRING_ISA avx512

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fastff.hpp"
#include "vectors_avx512.hpp"
//
#include "fastff_kernels.inl"
