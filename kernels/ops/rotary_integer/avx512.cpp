// The portable body compiled for AVX-512.
#include "ops/rotary_integer/body.hpp"

namespace lilliput {

void rotary_integer_avx512(const IntegerRotary& how, const int16_t* cos, const int16_t* sin, const void* x,
                           int64_t heads, void* y) {
  rotary_integer_body(how, cos, sin, x, heads, y);
}

}  // namespace lilliput
