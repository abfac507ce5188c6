// The vector body compiled for AVX-512.
#include "ops/activation/body.hpp"

namespace lilliput {

void activation_avx512(Activation kind, const float* x, const float* up, int64_t n, float* y) {
  activation_body(kind, x, up, n, y);
}

}  // namespace lilliput
