// The definition of rotary.
#include "ops/rotary/rotary.hpp"

#include <cmath>

namespace lilliput {

void rotary_reference(const float* cos, const float* sin, int64_t half, float* x) {
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    x[j] = a * cos[j] - b * sin[j];
    x[j + half] = b * cos[j] + a * sin[j];
  }
}

void rotary_angles(const float* inv_freq, int64_t half, int64_t position, float scale, float* cos, float* sin) {
  for (int64_t j = 0; j < half; ++j) {
    const float angle = static_cast<float>(position) * inv_freq[j];
    cos[j] = static_cast<float>(std::cos(static_cast<double>(angle))) * scale;
    sin[j] = static_cast<float>(std::sin(static_cast<double>(angle))) * scale;
  }
}

}  // namespace lilliput
