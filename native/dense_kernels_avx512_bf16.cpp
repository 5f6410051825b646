// Kernels for AVX-512 with bfloat16 dot products.
#define SHOESTRING_ISA avx512_bf16

#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "vectors_avx512.hpp"
//
#include "dense_kernels.inl"
#include "step_kernels.inl"
