// The vector body of norm; each variant compiles it for its instruction set.
#pragma once

#include "ops/norm/norm.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

// Sum of (x - center), or of its square.
template <bool Square>
LILLIPUT_INLINE float sum_of(const float* x, int64_t n, float center) {
  Floats sum{};
  for (int64_t k = 0; k < n; k += kLanes) {
    Floats v = load_some(x + k, n - k) - center;
    if (n - k < kLanes) v = select(numbered() < static_cast<int32_t>(n - k), v, Floats{});
    sum += Square ? v * v : v;
  }
  return total(sum);
}

LILLIPUT_INLINE void norm_body(const NormView& norm, const float* x, int64_t n, float* y) {
  const float count = static_cast<float>(n);
  const float mean = norm.layer ? sum_of<false>(x, n, 0.0f) / count : 0.0f;
  const float variance = sum_of<true>(x, n, mean) / count;
  const float factor = 1.0f / __builtin_sqrtf(variance + norm.eps);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    const Floats v = (load(x + k) - mean) * factor * (load(norm.weight + k) + norm.offset);
    store(y + k, norm.bias ? v + load(norm.bias + k) : v);
  }
  for (; k < n; ++k) {
    const float v = (x[k] - mean) * factor * (norm.weight[k] + norm.offset);
    y[k] = norm.bias ? v + norm.bias[k] : v;
  }
}

}  // namespace
}  // namespace lilliput
