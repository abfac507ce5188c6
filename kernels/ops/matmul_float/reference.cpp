// The definition of matmul_float, and its rows one by one for embedding tables.
#include "ops/matmul_float/body.hpp"

namespace lilliput {

void matmul_float_reference(const FloatView& w, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                            int64_t row_begin, int64_t row_end) {
  matmul_float_body<2>(w, x, tokens, ldx, y, ldy, row_begin, row_end);
}

void float_row(const FloatView& w, int64_t row, float* to) {
  const int64_t base = row * w.columns;
  for (int64_t k = 0; k < w.columns; ++k) {
    switch (w.dtype) {
      case Dtype::f32: to[k] = static_cast<const float*>(w.data)[base + k]; break;
      case Dtype::f16: to[k] = widen_half_1(static_cast<const uint16_t*>(w.data)[base + k]); break;
      case Dtype::bf16: to[k] = widen_bfloat_1(static_cast<const uint16_t*>(w.data)[base + k]); break;
    }
  }
}

}  // namespace lilliput
