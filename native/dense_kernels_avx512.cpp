// Kernels for AVX-512 (F, BW, VL, DQ).
#define SHOESTRING_ISA avx512

#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "vectors_avx512.hpp"
//
#include "dense_kernels.inl"
#include "step_kernels.inl"
