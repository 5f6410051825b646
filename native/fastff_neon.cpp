// Fast feedforward kernels for NEON.
#define SHOESTRING_ISA neon

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fastff.hpp"
#include "vectors_neon.hpp"
//
#include "fastff_kernels.inl"
