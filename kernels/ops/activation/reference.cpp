// The definition of activation.
#include <cmath>

#include "ops/activation/body.hpp"

namespace lilliput {

void gelu(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i];
    y[i] = static_cast<float>(0.5 * v * (1.0 + std::erf(v * 0.70710678118654752440)));
  }
}

void activation_reference(Activation kind, const float* x, const float* up, int64_t n, float* y) {
  activation_body(kind, x, up, n, y);
}

void softcap(float cap, float* x, int64_t n) {
  each(x, n, x, [cap](Floats v) { return cap * hyperbolic_tangent(v / cap); });
}

void exponentials(float* x, int64_t n) {
  each(x, n, x, [](Floats v) { return exponential(v); });
}

}  // namespace lilliput
