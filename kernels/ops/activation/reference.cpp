// The definition of activation.
#include "ops/activation/activation.hpp"

#include <cmath>

#include "ops/vec.hpp"

namespace lilliput {

// y[i] = f(x[i]) sixteen at a time; the tail is padded with zeros.
template <class F>
static void each(const float* x, int64_t n, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
  if (i == n) return;
  float lane[kLanes] = {};
  for (int64_t l = 0; i + l < n; ++l) lane[l] = x[i + l];
  store(lane, f(load(lane)));
  for (int64_t l = 0; i + l < n; ++l) y[i + l] = lane[l];
}

static float gelu(float x) {
  const double v = x;
  return static_cast<float>(0.5 * v * (1.0 + std::erf(v * 0.70710678118654752440)));
}

void activation_reference(Activation kind, const float* x, const float* up, int64_t n, float* y) {
  constexpr int64_t kBlock = 256;
  float act[kBlock];  // on the stack, so that y may be x or up
  for (int64_t base = 0; base < n; base += kBlock) {
    const int64_t count = n - base < kBlock ? n - base : kBlock;
    const float* from = x + base;
    switch (kind) {
      case Activation::silu: each(from, count, act, [](Floats v) { return v / (1.0f + exponential(-v)); }); break;
      case Activation::gelu:
        for (int64_t i = 0; i < count; ++i) act[i] = gelu(from[i]);
        break;
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

void softcap(float cap, float* x, int64_t n) {
  each(x, n, x, [cap](Floats v) { return cap * hyperbolic_tangent(v / cap); });
}

void exponentials(float* x, int64_t n) {
  each(x, n, x, [](Floats v) { return exponential(v); });
}

}  // namespace lilliput
