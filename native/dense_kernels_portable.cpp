// Kernels in plain C++: the twin of all others.
#define SHOESTRING_ISA portable

#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "vectors_portable.hpp"
//
#include "dense_kernels.inl"
#include "step_kernels.inl"
