// The vector body compiled for AVX2.
#include "ops/activation/body.hpp"

namespace lilliput {

void activation_avx2(Activation kind, const float* x, const float* up, int64_t n, float* y) {
  activation_body(kind, x, up, n, y);
}

}  // namespace lilliput
