// The portable body compiled for AVX2.
#include "ops/sum_integer/body.hpp"

namespace lilliput {

void sum_integer_avx2(const IntegerSum& how, const void* const* x, void* y, int64_t begin, int64_t end) {
  sum_integer_body(how, x, y, begin, end);
}

}  // namespace lilliput
