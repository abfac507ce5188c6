// The vector body of quantize_i8; each variant compiles it for its instruction set.
#pragma once

#include "ops/quantize_i8/quantize_i8.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

LILLIPUT_INLINE void quantize_i8_body(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scale,
                                      int32_t* sum) {
  for (int64_t begin = 0, g = 0; begin < columns; begin += group, ++g) {
    const int64_t end = columns - begin < group ? columns : begin + group;
    Ints most{};
    for (int64_t k = begin; k < end; k += kLanes) {
      const Ints bits = as_ints(as_words(load_some(x + k, end - k)) & 0x7fffffffu);
      most = select(bits > most, bits, most);
    }
    const int32_t top = lilliput::largest(most);
    float largest;
    std::memcpy(&largest, &top, sizeof top);
    float s = largest / 127.0f;
    if (s < 0x1p-126f) s = 0;
    const bool finite = top < 0x7f800000;
    scale[g] = finite ? s : __builtin_nanf("");
    if (!finite || s == 0) {
      sum[g] = 0;
      std::memset(codes + begin, 0, static_cast<size_t>(end - begin));
      continue;
    }
    Ints total_codes{};
    for (int64_t k = begin; k < end; k += kLanes) {
      const Floats rounded = load_some(x + k, end - k) / spread(s) + 12582912.0f;
      const Ints q = as_ints(as_words(rounded) - 0x4b400000u);
      total_codes += q;
      if (end - k >= kLanes) {
        store_bytes(codes + k, q);
      } else {
        int8_t part[kLanes];
        store_bytes(part, q);
        for (int64_t i = 0; i < end - k; ++i) codes[k + i] = part[i];
      }
    }
    sum[g] = total(total_codes);
  }
  for (int64_t k = columns; k < quantized_stride(columns); ++k) codes[k] = 0;
}

}  // namespace
}  // namespace lilliput
