// Kernels for AVX2 with FMA.
#define SHOESTRING_ISA avx2

#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "vectors_avx2.hpp"
//
#include "dense_kernels.inl"
#include "step_kernels.inl"
