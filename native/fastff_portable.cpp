// Fast feedforward kernels for plain C++.
#define SHOESTRING_ISA portable

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fastff.hpp"
#include "vectors_portable.hpp"
//
#include "fastff_kernels.inl"
