// The definition of quantize_i8.
#include "ops/quantize_i8/quantize_i8.hpp"

#include <cstring>

namespace lilliput {

void quantize_i8_reference(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scale, int32_t* sum) {
  for (int64_t begin = 0, g = 0; begin < columns; begin += group, ++g) {
    const int64_t end = columns - begin < group ? columns : begin + group;
    uint32_t most = 0;  // magnitudes compare as their bits do, and NaN is above infinity
    for (int64_t k = begin; k < end; ++k) {
      uint32_t bits;
      std::memcpy(&bits, x + k, sizeof bits);
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float largest;
    std::memcpy(&largest, &most, sizeof most);
    float s = largest / 127.0f;
    if (s < 0x1p-126f) s = 0;
    const bool finite = most < 0x7f800000u;
    scale[g] = finite ? s : __builtin_nanf("");
    sum[g] = 0;
    for (int64_t k = begin; k < end; ++k) {
      int32_t q = 0;
      if (finite && s > 0) {
        const float rounded = x[k] / s + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number, ties to even
        q = static_cast<int32_t>(rounded - 12582912.0f);
      }
      codes[k] = static_cast<int8_t>(q);
      sum[g] += q;
    }
  }
  for (int64_t k = columns; k < quantized_stride(columns); ++k) codes[k] = 0;
}

}  // namespace lilliput
