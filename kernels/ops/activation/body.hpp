// The vector body of activation; each variant compiles it for its instruction set.
#pragma once

#include "ops/activation/activation.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

// y[i] = f(x[i]) sixteen at a time; the tail is padded with zeros.
template <class F>
LILLIPUT_INLINE void each(const float* x, int64_t n, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
  if (i == n) return;
  float lane[kLanes] = {};
  for (int64_t l = 0; i + l < n; ++l) lane[l] = x[i + l];
  store(lane, f(load(lane)));
  for (int64_t l = 0; i + l < n; ++l) y[i + l] = lane[l];
}

LILLIPUT_INLINE void activation_body(Activation kind, const float* x, const float* up, int64_t n, float* y) {
  constexpr int64_t kBlock = 256;
  float act[kBlock];  // on the stack, so that y may be x or up
  for (int64_t base = 0; base < n; base += kBlock) {
    const int64_t count = n - base < kBlock ? n - base : kBlock;
    const float* from = x + base;
    switch (kind) {
      case Activation::silu: each(from, count, act, [](Floats v) { return v / (1.0f + exponential(-v)); }); break;
      case Activation::gelu: gelu(from, count, act); break;
      case Activation::gelu_tanh:
        each(from, count, act, [](Floats v) {
          return 0.5f * v * (1.0f + hyperbolic_tangent(0.79788456080286535588f * (v + 0.044715f * (v * v * v))));
        });
        break;
      case Activation::relu: each(from, count, act, [](Floats v) { return select(v < 0.0f, Floats{}, v); }); break;
    }
    for (int64_t i = 0; i < count; ++i) y[base + i] = up ? act[i] * up[base + i] : act[i];
  }
}

}  // namespace
}  // namespace lilliput
