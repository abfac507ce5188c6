// Activations as int8: one scale for each token and each group of inputs that a weight matrix is cut into.
//
//     scale[g] = max |x[k]| / 127 over the group, in float32; 0 where that is below 2^-126
//     q[k]     = x[k] / scale[g] rounded to nearest, ties to even; 0 where the scale is 0
//     sum[g]   = the sum of q over the group, which is what a weight's middle and zero multiply
//
// A group with an infinity or a NaN has the scale NaN and codes 0, so that the sums it enters are NaN as they would be
// in float. |q| <= 127: x / scale exceeds 127 by less than one rounding.
#pragma once

#include <cstdint>

namespace lilliput {

struct QuantizedView {
  const int8_t* codes;   // (tokens, stride), 0 beyond the columns
  const float* scale;    // (tokens, groups)
  const int32_t* sum;    // (tokens, groups)
  int64_t stride, groups;
};

constexpr int64_t kQuantizedUnit = 32;
static constexpr int64_t quantized_stride(int64_t columns) {
  return (columns + kQuantizedUnit - 1) / kQuantizedUnit * kQuantizedUnit;
}

// One token. x: (columns,); codes: (quantized_stride(columns),); scale, sum: one a group of `group` inputs.
typedef void QuantizeI8(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scale, int32_t* sum);
QuantizeI8 quantize_i8_reference, quantize_i8_avx2, quantize_i8_avx512, quantize_i8_neon;

}  // namespace lilliput
