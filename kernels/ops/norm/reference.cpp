// The definition of norm.
#include "ops/norm/body.hpp"

namespace lilliput {

void norm_reference(const NormView& norm, const float* x, int64_t n, float* y) { norm_body(norm, x, n, y); }

}  // namespace lilliput
