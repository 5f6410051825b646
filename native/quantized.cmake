# Sources of the quantised kernels, each instruction set with flags of its own; chosen at run time.
set(QUANTIZED_SOURCES quantized.cpp quantized_portable.cpp quantized_pack.cpp quantized_bindings.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  # GCC's own headers define "any value" by an uninitialised variable, and then warn of it.
  set(QUIET_INTRINSICS "$<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>")
  list(APPEND QUANTIZED_SOURCES quantized_avx2.cpp quantized_avx512_gguf.cpp quantized_avx512_tiles.cpp quantized_avx512_half.cpp)
  set_source_files_properties(quantized_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;-ffp-contract=off")
  set_source_files_properties(
    quantized_avx512_gguf.cpp quantized_avx512_tiles.cpp quantized_avx512_half.cpp
    PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx512vnni;-ffp-contract=off;${QUIET_INTRINSICS}")
  set_source_files_properties(quantized.cpp PROPERTIES COMPILE_DEFINITIONS SHOESTRING_X86_KERNELS)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  list(APPEND QUANTIZED_SOURCES quantized_neon.cpp)
  set_source_files_properties(quantized.cpp PROPERTIES COMPILE_DEFINITIONS SHOESTRING_NEON_KERNELS)
endif()
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  # Lets the packing search use vectors: nobody reads the exception flags of floating point.
  set_source_files_properties(quantized_pack.cpp PROPERTIES COMPILE_OPTIONS "-O3;-fno-trapping-math;-fno-math-errno")
endif()
