// The portable body compiled for AVX2: 4 tokens of sums stay in registers.
#include "ops/matmul_float/body.hpp"

namespace lilliput {

void matmul_float_avx2(const FloatView& w, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                     int64_t row_begin, int64_t row_end) {
  matmul_float_body<4>(w, x, tokens, ldx, y, ldy, row_begin, row_end);
}

}  // namespace lilliput
