// Fast feedforward kernels for AVX2 with FMA.
#define SHOESTRING_ISA avx2

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fastff.hpp"
#include "vectors_avx2.hpp"
//
#include "fastff_kernels.inl"
