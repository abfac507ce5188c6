// The vector body compiled for AVX2.
#include "ops/norm/body.hpp"

namespace lilliput {

void norm_avx2(const NormView& norm, const float* x, int64_t n, float* y) { norm_body(norm, x, n, y); }

}  // namespace lilliput
