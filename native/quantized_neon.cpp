// NEON kernels of the quantised types, for any 64-bit ARM; with the dot-product instruction where compiled for it.
#include <arm_neon.h>

#include "quantized_rows.hpp"

namespace shoestring {
namespace quantized {
namespace {

struct Neon {
  using Sum = float32x4_t;
  static Sum zero() { return vdupq_n_f32(0); }
  static float total(Sum sum) { return vaddvq_f32(sum); }

  template <class Format>
  static void decode(Format, const uint8_t* p, int lane, WeightBlock* out) {
    Format::decode(p, lane, out);
  }

  static int32x4_t dot16(const int8_t* a, const int8_t* b) {
    const int8x16_t va = vld1q_s8(a), vb = vld1q_s8(b);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vdupq_n_s32(0), va, vb);
#else
    return vpadalq_s16(vpaddlq_s16(vmull_s8(vget_low_s8(va), vget_low_s8(vb))), vmull_high_s8(va, vb));
#endif
  }

  template <bool kHalves>
  static Sum multiply_add(Sum sum, const WeightBlock& w, const ActivationBlock& x) {
    const int32x4_t low = dot16(w.q, x.values), high = dot16(w.q + 16, x.values + 16);
    if (kHalves) {
      sum = vfmaq_n_f32(sum, vcvtq_f32_s32(low), w.d[0] * x.scale);
      return vfmaq_n_f32(sum, vcvtq_f32_s32(high), w.d[1] * x.scale);
    }
    return vfmaq_n_f32(sum, vcvtq_f32_s32(vaddq_s32(low, high)), w.d[0] * x.scale);
  }
};

}  // namespace

const Kernel* neon_kernel(WeightType type) { return find_row_kernel<Neon>(type); }

}  // namespace quantized
}  // namespace shoestring
