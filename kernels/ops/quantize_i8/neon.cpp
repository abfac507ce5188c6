// The vector body compiled for Neon.
#include "ops/quantize_i8/body.hpp"

namespace lilliput {

void quantize_i8_neon(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scale, int32_t* sum) {
  quantize_i8_body(x, columns, group, codes, scale, sum);
}

}  // namespace lilliput
