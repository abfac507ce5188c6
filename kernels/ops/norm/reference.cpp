// The definition of norm.
#include "ops/norm/norm.hpp"

#include "ops/vec.hpp"

namespace lilliput {

// Sum of (x - center), or of its square.
template <bool Square>
static float sum_of(const float* x, int64_t n, float center) {
  Floats sum{};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    const Floats v = load(x + k) - center;
    sum += Square ? v * v : v;
  }
  float lane[kLanes];
  store(lane, sum);
  for (int64_t l = 0; k + l < n; ++l) {
    const float v = x[k + l] - center;
    lane[l] += Square ? v * v : v;
  }
  return total(load(lane));
}

void norm_reference(const NormView& norm, const float* x, int64_t n, float* y) {
  const float count = static_cast<float>(n);
  const float mean = norm.layer ? sum_of<false>(x, n, 0.0f) / count : 0.0f;
  const float variance = sum_of<true>(x, n, mean) / count;
  const float factor = 1.0f / __builtin_sqrtf(variance + norm.eps);
  for (int64_t k = 0; k < n; ++k) {
    const float v = (x[k] - mean) * factor * (norm.weight[k] + norm.offset);
    y[k] = norm.bias ? v + norm.bias[k] : v;
  }
}

}  // namespace lilliput
