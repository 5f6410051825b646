// Kernels for 64-bit ARM.
#define SHOESTRING_ISA neon

#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "vectors_neon.hpp"
//
#include "dense_kernels.inl"
#include "step_kernels.inl"
