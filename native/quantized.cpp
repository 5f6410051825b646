#include "quantized.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "quantized_formats.hpp"

namespace shoestring {

namespace q = quantized;

const Kernel* find_quantized_kernel(WeightType type, InstructionSet isa) {
  const Kernel* found = nullptr;
  switch (isa) {
    case InstructionSet::avx512_bf16_vnni: found = q::avx512_vnni_kernel(type); break;
    case InstructionSet::avx512:  // without VNNI nothing is won over AVX2
    case InstructionSet::avx2: found = q::avx2_kernel(type); break;
    case InstructionSet::neon: found = q::neon_kernel(type); break;
    case InstructionSet::portable: break;
  }
  return found ? found : q::portable_kernel(type);
}

size_t int8_blocks_bytes(int64_t cols) {
  return static_cast<size_t>((cols + kBlockCols - 1) / kBlockCols) * sizeof(ActivationBlock);
}

void prepare_int8_blocks(InstructionSet isa, const float* x, int64_t cols, uint8_t* out) {
  auto* blocks = reinterpret_cast<ActivationBlock*>(out);
#if defined(SHOESTRING_X86_KERNELS)
  if (isa == InstructionSet::avx512_bf16_vnni) return q::prepare_avx512(x, cols, blocks);
#endif
  (void)isa;
  q::prepare_portable(x, cols, blocks);
}

void dequantize_quantized_row(const Matrix& w, int64_t row, float* out) {
  if (w.type == WeightType::f16) {
    const uint8_t* p = w.data + 2 * row * w.cols;
    for (int64_t i = 0; i < w.cols; ++i) out[i] = q::load_half(p + 2 * i);
    return;
  }
  q::with_format(w.type, [&](auto format) {
    using Format = decltype(format);
    const uint8_t* p = q::row_start<Format>(w, row);
    q::WeightBlock blocks[Format::kCols / kBlockCols];
    for (int64_t col = 0; col < w.cols; col += Format::kCols, p += Format::kBytes) {
      Format::decode(p, static_cast<int>(row % Format::kRows), blocks);
      for (const q::WeightBlock& block : blocks) {
        for (int i = 0; i < kBlockCols; ++i) *out++ = block.d[i / 16] * static_cast<float>(block.q[i]) + block.m;
      }
    }
  });
}

int64_t quantized_matrix_bytes(WeightType type, int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 0) return -1;
  if (type == WeightType::f16) return 2 * rows * cols;
  int64_t bytes = -1;
  q::with_format(type, [&](auto format) {
    using Format = decltype(format);
    if (cols % Format::kCols == 0) {
      bytes = (rows + Format::kRows - 1) / Format::kRows * (cols / Format::kCols) * Format::kBytes;
    }
  });
  return bytes;
}

namespace quantized {

void prepare_portable(const float* x, int64_t cols, ActivationBlock* out) {
  for (int64_t col = 0; col < cols; col += kBlockCols, ++out) {
    const int count = static_cast<int>(std::min<int64_t>(kBlockCols, cols - col));
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < count; ++i) {
      const float size = std::fabs(x[col + i]);
      finite &= size <= std::numeric_limits<float>::max();
      largest = std::max(largest, size);
    }
    // Too small a block has no reciprocal; an infinite or NaN one must stay visible in the result.
    const bool used = finite && largest >= kSmallestActivation;
    const float inverse = used ? 127.0f / largest : 0;
    int32_t sums[2] = {0, 0};
    for (int i = 0; i < kBlockCols; ++i) {
      const int value = used && i < count ? static_cast<int>(std::nearbyint(x[col + i] * inverse)) : 0;
      out->values[i] = static_cast<int8_t>(value);
      sums[i / 16] += value;
    }
    out->scale = used ? largest / 127.0f : finite ? 0 : std::numeric_limits<float>::quiet_NaN();
    out->sum = out->scale * static_cast<float>(sums[0] + sums[1]);
    out->bias = -128 * (sums[0] + sums[1]);
    out->bias_high = -128 * sums[1];
  }
}

namespace {

struct Scratch {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Scratch() { release(); }
  void release() {
    if (data) ::operator delete(data, std::align_val_t(64));
    data = nullptr;
  }
};

}  // namespace

uint8_t* scratch(size_t bytes) {
  thread_local Scratch memory;
  if (memory.size < bytes) {
    memory.release();
    memory.size = 0;
    memory.data = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64)));
    memory.size = bytes;
  }
  return memory.data;
}

#if !defined(SHOESTRING_X86_KERNELS)
const Kernel* avx2_kernel(WeightType) { return nullptr; }
const Kernel* avx512_vnni_kernel(WeightType) { return nullptr; }
#endif
#if !defined(SHOESTRING_NEON_KERNELS)
const Kernel* neon_kernel(WeightType) { return nullptr; }
#endif

}  // namespace quantized
}  // namespace shoestring
