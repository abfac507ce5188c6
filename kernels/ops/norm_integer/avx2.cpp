// The portable body compiled for AVX2.
#include "ops/norm_integer/body.hpp"

namespace lilliput {

void norm_integer_avx2(const IntegerNorm& how, const int32_t* gain, const int64_t* offset, const void* x, int64_t n,
                       void* y, int32_t* scratch) {
  norm_integer_body(how, gain, offset, x, n, y, scratch);
}

}  // namespace lilliput
