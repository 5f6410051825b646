// Elementary functions on sixteen floats; a translation unit includes the vectors of its instruction set before.
#pragma once

namespace shoestring {
namespace SHOESTRING_ISA {
namespace {

// e^x to about one unit in the last place, for x clamped to [-87, 88].
inline F16 exponential(F16 x) {
  x = min(max(x, broadcast(-87.0f)), broadcast(88.0f));
  const F16 n = round(mul(x, broadcast(1.44269504088896341f)));
  F16 r = fnma(n, broadcast(0.693359375f), x);
  r = fnma(n, broadcast(-2.12194440e-4f), r);
  F16 p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), broadcast(1.0f));
  return scale_by_power(p, n);
}

// tanh(x) = sign(x) (1 - 2 / (e^(2|x|) + 1)); absolute error about one unit in the last place of 1.
inline F16 hyperbolic_tangent(F16 x) {
  const F16 one = broadcast(1.0f);
  return sub(one, div(broadcast(2.0f), add(exponential(add(x, x)), one)));
}

}  // namespace
}  // namespace SHOESTRING_ISA
}  // namespace shoestring
