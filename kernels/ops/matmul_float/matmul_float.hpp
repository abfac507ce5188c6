// y = x W^T for a row-major matrix of F32, F16 or BF16, converted on the fly (both conversions are exact).
//
//     s[l]    = ((0 + x[t, l] w[n, l]) + x[t, l + 16] w[n, l + 16]) + ..   for l in 0 .. 15
//     y[t, n] = s summed as a tree: s[l] += s[l + 8], then + 4, + 2, + 1
//
// Sixteen partial sums follow the storage: a row is contiguous, so no transposition is needed.
#pragma once

#include <cstdint>

namespace lilliput {

enum class Dtype : int { f32, f16, bf16 };

struct FloatView {
  const void* data;  // (out, columns), row-major
  Dtype dtype;
  int64_t out, columns;
};

// Rows [row_begin, row_end) of y. x: (tokens, ldx); y: (tokens, ldy), both float32.
typedef void MatmulFloat(const FloatView& w, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                         int64_t row_begin, int64_t row_end);
MatmulFloat matmul_float_reference, matmul_float_avx2, matmul_float_avx512;

// One row of W into `to`, (columns,) float32.
void float_row(const FloatView& w, int64_t row, float* to);

}  // namespace lilliput
