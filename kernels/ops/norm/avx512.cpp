// The vector body compiled for AVX-512.
#include "ops/norm/body.hpp"

namespace lilliput {

void norm_avx512(const NormView& norm, const float* x, int64_t n, float* y) { norm_body(norm, x, n, y); }

}  // namespace lilliput
